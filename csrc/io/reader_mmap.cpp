// Reads through the page cache: the file is mapped, pages are made present ahead of use, and the
// bytes are either used where they are (the buffer lies in the mapping) or copied out.
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/align.h"
#include "io/page_cache.h"
#include "io/pool.h"

namespace nexus {

std::unique_ptr<Reader> make_mmap_reader(int depth, bool trailing_drop) {
  return std::make_unique<PoolReader>(
      depth, "mmap", [trailing_drop](const Request& request) -> int64_t {
        const File& file = *request.file;
        const int64_t nbytes = std::min(request.nbytes, file.size() - request.offset);
        if (nbytes <= 0) return 0;
        const std::byte* source = file.mapping() + request.offset;
        // A page beyond a truncated end answers with an error here; touching it would be SIGBUS.
        const int error = populate(source, nbytes);
        if (error == EFAULT) return 0;
        if (error != 0) return -error;
        if (source == request.buffer) return nbytes;
        std::memcpy(request.buffer, source, static_cast<size_t>(nbytes));
        if (trailing_drop) file.drop(request.offset, nbytes);
        return nbytes;
      });
}

}  // namespace nexus
