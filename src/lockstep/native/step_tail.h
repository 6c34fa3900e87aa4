// Step tail: what follows a step's shards, without the interpreter: meet, sum, update, meet again.
//
// It does what worker/train_step.py does, in that order, on the same words in shared memory and by
// the same kernels. Whatever is not the plain case is left to that file; nothing here decides it.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace lockstep {

using Tensors = std::vector<at::Tensor>;

// Addresses in the control segment (see state/control_segment.py).
struct Words {
  int32_t* progress = nullptr;  // this worker's
  std::vector<int32_t*> others;  // the other workers' progress
  const int32_t* epoch = nullptr;
  int32_t* updating = nullptr;
  const uint8_t* has_gradient = nullptr;  // by shard and parameter
  int64_t gradients = 0;  // how many of these there are
  double* learning_rates = nullptr;  // by step; null: another worker tells them
};

// One addition of the tree sum: out = left + right.
struct Addition {
  at::Tensor left, right, out;
};

enum class Kernel { Adam, AdamW, Sgd };

// The members of one parameter group of the optimizer, and their state.
struct Part {
  Kernel kernel;
  Tensors params, gradients;
  Tensors first, second, largest, steps;  // SGD: `first` is the momentum, the others are empty
};

// Blocks whose gradients are summed before any of them is updated.
struct Group {
  std::vector<Addition> additions;
  std::vector<Part> parts;
};

enum class Ending : int { Committed = 0, Regroup = 1, NotUniform = 2 };

// How a step ended, and when what was reached, as time.perf_counter() would have said it.
struct Ended {
  Ending ending;
  double met = 0, updated = 0, committed = 0;
};

// What an update depends on that may change from step to step, by part, in the order of
// optim/direct_update.py: Adam: lr, beta1, beta2, weight_decay, eps, amsgrad, maximize;
// SGD: lr, momentum, dampening, weight_decay, nesterov, maximize.
using Options = std::vector<std::vector<double>>;

class StepTail {
 public:
  // `look` is called after every nap: signals may be pending. `most_spins`: how often a word is
  // looked at, at most, before the first nap.
  StepTail(Words words, int32_t epoch, int most_spins, std::function<void()> look)
      : words_(std::move(words)), epoch_(epoch), spins_(most_spins), most_spins_(most_spins),
        look_(std::move(look)) {}

  void add(Group group) { groups_.push_back(std::move(group)); }

  // Publish this worker's progress.
  void arrive(int32_t progress) const;

  // From the first meeting, at which this worker has arrived, to the commit. `computed` and
  // `updated` are the progress words of the two meetings, `place` is the step's in the ring buffer.
  // Regroup: the membership has changed. NotUniform: some shard has no gradient of some parameter;
  // nothing has been done yet.
  Ended finish(int32_t step, int32_t computed, int32_t updated, int64_t place, double rate,
               const Options& options);

 private:
  bool wait(int32_t progress);
  bool wait_for(const int32_t* word, int32_t progress);
  bool uniform() const;

  Words words_;
  int32_t epoch_;
  int spins_, most_spins_;
  std::function<void()> look_;
  std::vector<Group> groups_;
};

}  // namespace lockstep
