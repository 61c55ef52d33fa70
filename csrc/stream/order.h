// The order of use: declared at first, learnt from then on. Owns what was acquired lately.
//
// Note [What comes next]
// What followed the last time that looked most like now: of all earlier places where the group in
// use was acquired, the one with the longest run of equal groups before it, and of equals the
// latest. A forward pass, a training step (forward, then back), a decoder that runs without its
// encoder and a block that is called twice are all just sequences that came before. History begins
// with two training steps (the declared order and back) and, unconnected to them, two passes: the
// first pass, the first wrap-around and all but the first turn of training are no surprises.
#pragma once

#include <cstddef>
#include <vector>

namespace nexus {

class Order {
 public:
  Order() = default;
  explicit Order(std::vector<int> declared);

  // Each streamed group once, as declared.
  const std::vector<int>& declared() const { return declared_; }
  bool is_last(int group) const { return !history_.empty() && history_.back() == group; }
  // A streamed group is in use now. Again the same one is no news.
  void visit(int group);
  // The next `count` different groups, most urgent first, other than the one in use.
  void predict(size_t count, std::vector<int>& groups) const;

 private:
  size_t likeliest_place() const;
  size_t equal_before(size_t place) const;

  std::vector<int> declared_;
  size_t num_kept_ = 0;  // of history_, from its beginning: never forgotten
  size_t longest_ = 0;   // history is cut back to its half when it reaches this
  std::vector<int> history_;
};

}  // namespace nexus
