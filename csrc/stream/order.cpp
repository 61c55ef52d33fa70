#include "stream/order.h"

#include <algorithm>

namespace nexus {
namespace {

// Passes remembered besides the declared ones; more would only find the same answer later.
constexpr size_t kPasses = 4;

// What stands before it in history was not followed by what stands behind it.
constexpr int kBreak = -1;

}  // namespace

Order::Order(std::vector<int> declared) : declared_(std::move(declared)) {
  const auto forward = [this] {
    for (const int group : declared_) visit(group);
  };
  for (int step = 0; step < 2; ++step) {
    forward();
    for (size_t i = declared_.size(); i-- > 0;) visit(declared_[i]);
  }
  visit(kBreak);
  forward();
  forward();
  num_kept_ = history_.size();
  longest_ = num_kept_ + 2 * kPasses * declared_.size();
}

void Order::visit(int group) {
  if (is_last(group)) return;
  history_.push_back(group);
  if (num_kept_ == 0 || history_.size() < longest_) return;
  const auto forgotten = history_.begin() + static_cast<std::ptrdiff_t>(num_kept_);
  history_.erase(forgotten, forgotten + static_cast<std::ptrdiff_t>(kPasses * declared_.size()));
}

void Order::predict(size_t count, std::vector<int>& groups) const {
  groups.clear();
  if (declared_.size() <= 1) {
    groups = declared_;
    return;
  }
  const size_t now = history_.size() - 1;
  const size_t place = likeliest_place();
  // Past now, the sequence since that place repeats.
  const size_t period = now - place;
  for (size_t step = 0; step < period && groups.size() < count; ++step) {
    const int group = history_[place + 1 + step];
    if (group == kBreak) break;
    if (group == history_[now]) continue;
    if (std::find(groups.begin(), groups.end(), group) == groups.end()) groups.push_back(group);
  }
}

// See Note [What comes next].
size_t Order::likeliest_place() const {
  const size_t now = history_.size() - 1;
  size_t best = 0;
  size_t longest = 0;
  for (size_t place = now; place-- > 0;) {
    if (history_[place] != history_[now] || history_[place + 1] == kBreak) continue;
    const size_t length = equal_before(place);
    if (length > longest) {
      longest = length;
      best = place;
    }
  }
  return best;
}

// How many groups up to `place`, itself included, are those up to now. Two passes tell enough.
size_t Order::equal_before(size_t place) const {
  const size_t now = history_.size() - 1;
  const size_t limit = std::min(place + 1, 2 * declared_.size());
  size_t length = 0;
  while (length < limit && history_[place - length] == history_[now - length]) ++length;
  return length;
}

}  // namespace nexus
