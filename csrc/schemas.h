// The launchers' operators, the same for every compiled backend: they write into outputs that are there.
#pragma once

namespace fractal {

template <class Library>
void define_launchers(Library& m) {
  m.def(
      "channel_stats(Tensor(a!) mean, Tensor(b!) var, Tensor(c!) count, Tensor[] ys, Tensor? mask,"
      " Tensor(d!)[] running, float momentum, Tensor? momenta, bool channels_last) -> ()");
  m.def(
      "join_forward(Tensor(a!) out, Tensor[] ys, Tensor? mask, Tensor[] means, Tensor[] vars, Tensor[] weights,"
      " Tensor[] biases, float eps, int flags, bool channels_last) -> ()");
  m.def(
      "join_backward_reduce(Tensor(a!) sum_dz, Tensor(b!) sum_dzx, Tensor grad, Tensor[] ys, Tensor? mask,"
      " Tensor[] means, Tensor[] vars, Tensor[] weights, Tensor[] biases, float eps, int flags, bool channels_last)"
      " -> ()");
  m.def(
      "join_backward_apply(Tensor(a!)[] dys, Tensor grad, Tensor[] ys, Tensor? mask, Tensor[] means, Tensor[] vars,"
      " Tensor[] weights, Tensor[] biases, Tensor[] sums, float eps, int flags, bool channels_last) -> ()");
}

}  // namespace fractal
