#include "kernel_list.h"

#include <ATen/core/List.h>
#include <c10/core/GradMode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

namespace lockstep {

c10::OperatorHandle KernelList::find(const std::string& name, const std::string& overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
}

void KernelList::add(Call call) { calls_.push_back(std::move(call)); }

void KernelList::close(int loss, const std::vector<int>& kept) {
  loss_ = loss;
  kept_.assign(registers_, false);
  for (int each : kept) kept_.at(each) = true;
  // Backwards: the first use that is met of a register is its last. Memory is released as early as
  // the interpreter does it, so that it is used again while the caches still hold it.
  std::vector<bool> needed = kept_;
  needed.at(loss) = true;
  for (Call& call : calls_) call.released.clear();
  for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
    const auto release = [&](int number) {
      if (number == kNothing || needed.at(number)) return;
      needed[number] = true;
      call->released.push_back(number);
    };
    for (int number : call->results) release(number);
    for (const Argument& argument : call->arguments) {
      for (int number : argument.registers) release(number);
    }
  }
}

BoundList::BoundList(std::shared_ptr<const KernelList> list, const std::vector<int>& kept,
                     std::vector<at::Tensor> tensors, std::vector<int> inputs)
    : list_(std::move(list)), inputs_(std::move(inputs)), values_(list_->registers_) {
  TORCH_CHECK(kept.size() == tensors.size(), "a tensor for each register that is kept");
  for (size_t i = 0; i < kept.size(); ++i) values_.at(kept[i]) = std::move(tensors[i]);
  stack_.reserve(32);
}

double BoundList::run(std::vector<at::Tensor> inputs) {
  TORCH_CHECK(inputs.size() == inputs_.size(), "as many tensors as the list takes");
  // As under torch.no_grad(), and without asking autograd in each call.
  c10::AutoGradMode without_gradient(false);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  struct Clearing {
    BoundList* list;
    ~Clearing() { list->clear(); }
  } clearing{this};  // also where an operation throws
  for (size_t i = 0; i < inputs.size(); ++i) values_[inputs_[i]] = std::move(inputs[i]);
  for (const Call& call : list_->calls_) perform(call);
  return values_.at(list_->loss_).toTensor().item().toDouble();
}

void BoundList::perform(const Call& call) {
  if (!call.operation) {  // an element of a list
    const Argument& source = call.arguments[0];
    const auto& tensors = values_[source.registers[0]].toTensorVector();
    values_[call.results[0]] = tensors.at(call.arguments[1].constant.toInt());
  } else {
    stack_.clear();
    for (const Argument& argument : call.arguments) push(argument);
    call.operation->callBoxed(stack_);
    TORCH_CHECK(stack_.size() >= call.results.size(), "fewer results than the schema says");
    for (size_t i = 0; i < call.results.size(); ++i) {
      if (call.results[i] != kNothing) values_[call.results[i]] = std::move(stack_[i]);
    }
    stack_.clear();
  }
  for (int number : call.released) values_[number] = c10::IValue();
}

void BoundList::push(const Argument& argument) {
  switch (argument.kind) {
    case Argument::Kind::Constant:
      stack_.push_back(argument.constant);
      return;
    case Argument::Kind::Register:
      stack_.push_back(values_[argument.registers[0]]);
      return;
    case Argument::Kind::Tensors: {
      c10::List<at::Tensor> tensors;
      tensors.reserve(argument.registers.size());
      for (int number : argument.registers) tensors.push_back(values_[number].toTensor());
      stack_.emplace_back(std::move(tensors));
      return;
    }
    case Argument::Kind::OptionalTensors: {
      c10::List<std::optional<at::Tensor>> tensors;
      tensors.reserve(argument.registers.size());
      for (int number : argument.registers) {
        if (number == kNothing) {
          tensors.push_back(std::nullopt);
        } else {
          tensors.push_back(values_[number].toTensor());
        }
      }
      stack_.emplace_back(std::move(tensors));
      return;
    }
  }
}

void BoundList::clear() {
  stack_.clear();
  for (size_t number = 0; number < values_.size(); ++number) {
    if (!list_->kept_[number]) values_[number] = c10::IValue();
  }
}

}  // namespace lockstep
