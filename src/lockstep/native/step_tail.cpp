#include "step_tail.h"

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/add.h>
#include <c10/core/GradMode.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

namespace lockstep {

namespace {

// The longest single sleep before the epoch is looked at again (NAP in collectives/barrier.py).
constexpr long kNapNanoseconds = 20'000'000;
// A wait of this length is a short one (SHORT_SECONDS in system/spin_budget.py).
constexpr double kShortSeconds = 1e-3;

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

int32_t read(const int32_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

void write(int32_t* word, int32_t value) { __atomic_store_n(word, value, __ATOMIC_SEQ_CST); }

void wake(int32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

// Sleep while the word is `value`; returns early for no reason, too.
void nap(const int32_t* word, int32_t value) {
  const timespec limit{0, kNapNanoseconds};
  syscall(SYS_futex, word, FUTEX_WAIT, value, &limit, nullptr, 0);
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void adam(const Part& part, const std::vector<double>& options) {
  const double lr = options.at(0), beta1 = options.at(1), beta2 = options.at(2);
  const double decay = options.at(3), eps = options.at(4);
  const bool amsgrad = options.at(5) != 0, maximize = options.at(6) != 0;
  at::_foreach_add_(part.steps, 1);
  const auto kernel = part.kernel == Kernel::AdamW
      ? static_cast<decltype(&at::_ops::_fused_adamw_::call)>(at::_ops::_fused_adamw_::call)
      : static_cast<decltype(&at::_ops::_fused_adam_::call)>(at::_ops::_fused_adam_::call);
  kernel(part.params, part.gradients, part.first, part.second, part.largest, part.steps, lr, beta1,
         beta2, decay, eps, amsgrad, maximize, std::nullopt, std::nullopt);
}

void sgd(const Part& part, const std::vector<double>& options) {
  const double lr = options.at(0), momentum = options.at(1), dampening = options.at(2);
  const double decay = options.at(3);
  const bool nesterov = options.at(4) != 0, maximize = options.at(5) != 0;
  at::_fused_sgd_(part.params, part.gradients, part.first, decay, momentum, lr, dampening, nesterov,
                  maximize, /*is_first_step=*/false, std::nullopt, std::nullopt);
}

}  // namespace

void StepTail::arrive(int32_t progress) const {
  write(words_.progress, progress);
  if (!words_.others.empty()) wake(words_.progress);
}

// Whether every other worker has come so far; false: the membership has changed.
bool StepTail::wait(int32_t progress) {
  // A lone worker waits for nobody who could hold it up.
  if (words_.others.empty()) return read(words_.epoch) == epoch_;
  for (const int32_t* other : words_.others) {
    if (!wait_for(other, progress)) return false;
  }
  return true;
}

bool StepTail::wait_for(const int32_t* word, int32_t progress) {
  if (read(word) >= progress) return true;
  const double begun = now();
  int32_t seen;
  for (int left = spins_; (seen = read(word)) < progress;) {
    if (read(words_.epoch) != epoch_) return false;
    if (left > 0) {
      --left;
      pause();
    } else {
      nap(word, seen);
      look_();
    }
  }
  // As SpinBudget.learn: one look after a long wait, twice as many after a short one.
  spins_ = now() - begun < kShortSeconds ? std::min(2 * spins_, most_spins_) : 1;
  return true;
}

bool StepTail::uniform() const {
  for (int64_t i = 0; i < words_.gradients; ++i) {
    if (words_.has_gradient[i] != 1) return false;
  }
  return true;
}

Ended StepTail::finish(int32_t step, int32_t computed, int32_t updated, int64_t place, double rate,
                       const Options& options) {
  Ended ended{Ending::Regroup};
  if (!wait(computed)) return ended;
  ended.met = now();
  if (!uniform()) {
    ended.ending = Ending::NotUniform;
    return ended;
  }
  // From here on, until all workers have updated their blocks, the state is between two steps: who
  // dies now is seen to have begun, so that the snapshot is put back.
  write(words_.updating, step);
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (words_.learning_rates != nullptr) words_.learning_rates[place] = rate;
  {
    c10::AutoGradMode without_gradient(false);
    size_t number = 0;
    for (const Group& group : groups_) {
      for (const Addition& each : group.additions) {
        at::Tensor out = each.out;
        at::add_out(out, each.left, each.right);
      }
      for (const Part& part : group.parts) {
        const std::vector<double>& chosen = options.at(number++);
        if (part.kernel == Kernel::Sgd) {
          sgd(part, chosen);
        } else {
          adam(part, chosen);
        }
      }
    }
  }
  ended.updated = now();
  arrive(updated);
  if (!wait(updated)) return ended;
  ended.committed = now();
  ended.ending = Ending::Committed;
  return ended;
}

}  // namespace lockstep
