// Module: what Python sees of the native path. Conversions of arguments are PyTorch's own.

#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_arg_parser.h>

#include "kernel_list.h"
#include "step_tail.h"

namespace py = pybind11;

namespace lockstep {

namespace {

using Kind = Argument::Kind;
using Lowered = std::pair<std::string, py::object>;  // see lowering.py

Argument argument_of(const Lowered& lowered, const c10::TypePtr& type) {
  const auto& [kind, value] = lowered;
  Argument argument;
  if (kind == "constant") {
    argument.constant = torch::jit::toIValue(value, type);
  } else if (kind == "register") {
    argument.kind = Kind::Register;
    argument.registers = {value.cast<int>()};
  } else {
    TORCH_CHECK(kind == "tensors" || kind == "optional tensors", "no argument: ", kind);
    argument.kind = kind == "tensors" ? Kind::Tensors : Kind::OptionalTensors;
    argument.registers = value.cast<std::vector<int>>();
  }
  return argument;
}

void add_call(KernelList& list, const std::string& name, const std::string& overload,
              const std::vector<Lowered>& arguments, std::vector<int> results) {
  Call call;
  call.operation = KernelList::find(name, overload);
  const auto& schema = call.operation->schema();
  TORCH_CHECK(schema.arguments().size() == arguments.size(), "an argument for each of the schema");
  // Some operations take numbers for tensors when they are called from Python: they do so here.
  const std::string bare = name.substr(name.find("::") + 2);
  torch::jit::ToIValueAllowNumbersAsTensors allowing(torch::should_allow_numbers_as_tensors(bare));
  for (size_t i = 0; i < arguments.size(); ++i) {
    call.arguments.push_back(argument_of(arguments[i], schema.arguments()[i].real_type()));
  }
  call.results = std::move(results);
  list.add(std::move(call));
}

void add_choice(KernelList& list, int source, int64_t index, int result) {
  Call call;
  Argument tensors, place;
  tensors.kind = Kind::Register;
  tensors.registers = {source};
  place.constant = c10::IValue(index);
  call.arguments = {tensors, place};
  call.results = {result};
  list.add(std::move(call));
}

// Let Python's handlers of signals run; they may raise.
void look_at_signals() {
  py::gil_scoped_acquire held;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

template <typename Word>
Word* at_address(uint64_t address) {
  return reinterpret_cast<Word*>(address);
}

StepTail make_tail(uint64_t progress, const std::vector<uint64_t>& others, uint64_t epoch_word,
                   uint64_t updating, std::pair<uint64_t, int64_t> has_gradient, uint64_t rates,
                   int32_t epoch, int most_spins) {
  Words words;
  words.progress = at_address<int32_t>(progress);
  for (uint64_t other : others) words.others.push_back(at_address<int32_t>(other));
  words.epoch = at_address<int32_t>(epoch_word);
  words.updating = at_address<int32_t>(updating);
  words.has_gradient = at_address<uint8_t>(has_gradient.first);
  words.gradients = has_gradient.second;
  words.learning_rates = at_address<double>(rates);
  return StepTail(std::move(words), epoch, most_spins, look_at_signals);
}

using LoweredPart =
    std::tuple<std::string, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors>;

void add_group(StepTail& tail, const std::vector<std::tuple<at::Tensor, at::Tensor, at::Tensor>>&
                                   additions,
               const std::vector<LoweredPart>& parts) {
  Group group;
  for (const auto& [left, right, out] : additions) group.additions.push_back({left, right, out});
  for (const auto& [name, params, gradients, first, second, largest, steps] : parts) {
    TORCH_CHECK(name == "adam" || name == "adamw" || name == "sgd", "no kernel: ", name);
    const Kernel kernel =
        name == "sgd" ? Kernel::Sgd : name == "adam" ? Kernel::Adam : Kernel::AdamW;
    group.parts.push_back({kernel, params, gradients, first, second, largest, steps});
  }
  tail.add(std::move(group));
}

std::tuple<int, double, double, double> finish(StepTail& tail, int32_t step, int32_t computed,
                                               int32_t updated, int64_t place, double rate,
                                               const Options& options) {
  const Ended ended = tail.finish(step, computed, updated, place, rate, options);
  return {static_cast<int>(ended.ending), ended.met, ended.updated, ended.committed};
}

}  // namespace

PYBIND11_MODULE(lockstep_native, module) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.attr("COMPILER") = LOCKSTEP_COMPILER;
  py::class_<KernelList, std::shared_ptr<KernelList>>(module, "KernelList")
      .def(py::init<int>())
      .def("call", &add_call)
      .def("choose", &add_choice)
      .def("close", &KernelList::close);
  py::class_<BoundList>(module, "BoundList")
      .def(py::init<std::shared_ptr<KernelList>, std::vector<int>, Tensors, std::vector<int>>())
      .def("run", &BoundList::run, released);
  py::class_<StepTail>(module, "StepTail")
      .def(py::init(&make_tail))
      .def("group", &add_group)
      .def("arrive", &StepTail::arrive, released)
      .def("finish", &finish, released);
}

}  // namespace lockstep
