// One way to fail. The stable ABI carries only a text to Python, so the class of the error stands
// in front of it ("nexus:ReadError: ..."); nexus_ext/errors.py holds the other half.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace nexus {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

class Error : public std::runtime_error {
 public:
  Error(const char* kind, const std::string& message)
      : std::runtime_error(concat("nexus:", kind, ": ", message)) {}
};

template <typename... Parts>
[[noreturn]] void fail(const char* kind, const Parts&... parts) {
  throw Error(kind, concat(parts...));
}

}  // namespace nexus
