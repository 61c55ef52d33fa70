// Stands in for reader_uring.cpp in a build without liburing.
#include "io/reader.h"

namespace nexus {

std::unique_ptr<Reader> make_uring_reader(int, const Buffers&, std::string& refusal,
                                          const UringOptions&) {
  refusal = "this build has no io_uring (liburing was not found when it was built)";
  return nullptr;
}

}  // namespace nexus
