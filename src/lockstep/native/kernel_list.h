// Kernel list: the operations of a traced shard, run without the interpreter.
//
// A list is made once of the operations that PyTorch's own tracer has written down: overloads of
// the dispatcher, their arguments, and which of them are results of earlier ones. Running it calls
// the same overloads in the same order, so what it computes is the same by construction.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace lockstep {

// Values are kept in registers, by number: what is given, and what operations return.
constexpr int kNothing = -1;

// An argument of an operation: a constant, or what registers hold at the time.
struct Argument {
  enum class Kind { Constant, Register, Tensors, OptionalTensors };
  Kind kind = Kind::Constant;
  c10::IValue constant;
  std::vector<int> registers;  // kNothing, in a list of optional tensors: None
};

// One operation, or, where there is none, the choice of one element of a list of tensors.
struct Call {
  std::optional<c10::OperatorHandle> operation;
  std::vector<Argument> arguments;
  std::vector<int> results;  // where the results go; kNothing: nowhere
  std::vector<int> released;  // registers that nobody reads after this call
};

class KernelList {
 public:
  explicit KernelList(int registers) : registers_(registers) {}

  // The schema of an operation. Throws where there is none of this name.
  static c10::OperatorHandle find(const std::string& name, const std::string& overload);

  void add(Call call);
  // Where the loss will be. Nothing is added after this: it is seen here what can be released when.
  void close(int loss, const std::vector<int>& kept);

 private:
  friend class BoundList;
  int registers_;
  int loss_ = kNothing;
  std::vector<Call> calls_;
  std::vector<bool> kept_;  // by register: whether it is bound, not computed
};

// A list with the tensors that are the same each time: parameters, and the slot's gradients.
class BoundList {
 public:
  BoundList(std::shared_ptr<const KernelList> list, const std::vector<int>& kept,
            std::vector<at::Tensor> tensors, std::vector<int> inputs);

  // Run all operations on these inputs; returns the loss.
  double run(std::vector<at::Tensor> inputs);

 private:
  void perform(const Call& call);
  void push(const Argument& argument);
  void clear();

  std::shared_ptr<const KernelList> list_;
  std::vector<int> inputs_;  // the registers of what is given to `run`
  std::vector<c10::IValue> values_;  // by register
  std::vector<c10::IValue> stack_;
};

}  // namespace lockstep
