// A reader made of two: one served from outside, for the memory that only others can write to, and
// an ordinary one for the rest. Called by one thread, like any reader.
#pragma once

#include <functional>
#include <memory>

#include "io/reader.h"
#include "io/reader_external.h"

namespace nexus {

// True for the buffers that `external` is to fill.
using IsExternal = std::function<bool(const std::byte* buffer)>;

// `external` is shared with those who serve it, and not stopped with this reader.
std::unique_ptr<Reader> make_split_reader(std::unique_ptr<Reader> inner,
                                          std::shared_ptr<ExternalReader> external,
                                          IsExternal is_external);

}  // namespace nexus
