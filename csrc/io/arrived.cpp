#include "io/arrived.h"

#include <algorithm>
#include <iterator>

namespace nexus {

void Arrived::add(int64_t offset, int64_t nbytes) {
  if (nbytes <= 0) return;
  const std::lock_guard lock(mutex_);
  int64_t begin = offset;
  int64_t end = offset + nbytes;
  auto next = ends_.upper_bound(begin);
  if (next != ends_.begin() && std::prev(next)->second >= begin) --next;
  while (next != ends_.end() && next->first <= end) {
    begin = std::min(begin, next->first);
    end = std::max(end, next->second);
    next = ends_.erase(next);
  }
  ends_[begin] = end;
}

bool Arrived::covers(int64_t offset, int64_t nbytes) const {
  if (is_whole_ || nbytes <= 0) return true;
  const std::lock_guard lock(mutex_);
  const auto next = ends_.upper_bound(offset);
  return next != ends_.begin() && std::prev(next)->second >= offset + nbytes;
}

}  // namespace nexus
