// Note [Waiting for two readers]
// Neither a helper thread nor a common queue: a ring must not be used by two threads, and need not
// be. Where only one reader has requests in flight, that one is waited for. Where both have, what
// was answered from outside is returned first, and else the ordinary reader is waited for. It
// always comes back, for it needs nobody but the disk; the answers from outside wait meanwhile for
// one ordinary read, not for their turn behind all of them. Nor do the ordinary ones starve: after
// as many answers from outside as can be in flight, it is their turn.
#include "io/reader_split.h"

#include <algorithm>
#include <utility>

namespace nexus {
namespace {

class SplitReader final : public Reader {
 public:
  SplitReader(std::unique_ptr<Reader> inner, std::shared_ptr<ExternalReader> external,
              IsExternal is_external)
      : inner_(std::move(inner)),
        external_(std::move(external)),
        is_external_(std::move(is_external)) {}

  // All requests may be for the same one of the two.
  int depth() const override { return std::min(inner_->depth(), external_->depth()); }

  std::string name() const override { return external_->name() + ", " + inner_->name(); }

  void submit(Request* request) override {
    const bool is_external = is_external_(request->buffer);
    ++(is_external ? num_external_ : num_inner_);
    Reader& reader = is_external ? static_cast<Reader&>(*external_) : *inner_;
    reader.submit(request);
  }

  Request* wait() override {
    if (num_inner_ == 0) return wait_external();
    if (num_external_ > 0 && num_in_a_row_ < depth()) {
      if (Request* request = external_->try_wait()) {
        ++num_in_a_row_;
        --num_external_;
        return request;
      }
    }
    num_in_a_row_ = 0;
    --num_inner_;
    return inner_->wait();
  }

 private:
  Request* wait_external() {
    --num_external_;
    return external_->wait();
  }

  std::unique_ptr<Reader> inner_;
  std::shared_ptr<ExternalReader> external_;
  IsExternal is_external_;
  int num_inner_ = 0;     // in flight
  int num_external_ = 0;  // in flight
  int num_in_a_row_ = 0;  // answers from outside since the last ordinary one
};

}  // namespace

std::unique_ptr<Reader> make_split_reader(std::unique_ptr<Reader> inner,
                                          std::shared_ptr<ExternalReader> external,
                                          IsExternal is_external) {
  return std::make_unique<SplitReader>(std::move(inner), std::move(external),
                                       std::move(is_external));
}

}  // namespace nexus
