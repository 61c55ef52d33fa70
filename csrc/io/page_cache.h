// The page cache: what of a file is in it, and how to bring it in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nexus {

// Makes every page of the range present and mapped. 0, or an errno (EFAULT: beyond the end of a
// file that was truncated). Kernels before 5.14 lack the call; there each page is touched.
int populate(const std::byte* begin, int64_t nbytes);

// The same in parallel jobs of 32 MiB, and every page touched. Returns the bytes made present;
// stops early on `cancel`.
int64_t populate_parallel(const std::byte* begin, int64_t nbytes, int num_threads,
                          const volatile bool* cancel);

// Bytes of the open file that are in the page cache now, or -1 where the kernel does not tell.
int64_t cached_bytes(int descriptor, int64_t size);

}  // namespace nexus
