// What the glue of the masked optimiser steps shares between devices: checks of hyperparameters.
#pragma once

#include <math.h>

#include <optional>

#include "list.h"

namespace nibblock {
namespace glue {

using OptTensor = std::optional<Tensor>;

inline void check_hyper(const char* op, const char* name, double value, double below = INFINITY) {
  if (below == INFINITY) {
    STD_TORCH_CHECK(value >= 0.0 && value < INFINITY, op, ": ", name,
                    " must be finite and at least 0, got ", value);
  } else {
    STD_TORCH_CHECK(value >= 0.0 && value < below, op, ": ", name, " must be in [0, ", below,
                    "), got ", value);
  }
}

inline UpdateParams adamw(const char* op, double lr, double beta1, double beta2, double eps,
                          double weight_decay) {
  check_hyper(op, "lr", lr);
  check_hyper(op, "beta1", beta1, 1.0);
  check_hyper(op, "beta2", beta2, 1.0);
  check_hyper(op, "eps", eps);
  check_hyper(op, "weight_decay", weight_decay);
  UpdateParams p = {};
  p.rule = UpdateRule::kAdamW;
  p.lr = lr;
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = eps;
  p.weight_decay = weight_decay;
  return p;
}

inline UpdateParams sgd(const char* op, double lr, double momentum, double dampening,
                        double weight_decay, bool nesterov) {
  check_hyper(op, "lr", lr);
  check_hyper(op, "momentum", momentum);
  STD_TORCH_CHECK(dampening == dampening && dampening < INFINITY && dampening > -INFINITY, op,
                  ": dampening must be finite, got ", dampening);
  check_hyper(op, "weight_decay", weight_decay);
  STD_TORCH_CHECK(!nesterov || (momentum > 0.0 && dampening == 0.0), op,
                  ": nesterov must come with momentum above 0 and dampening 0, got momentum=",
                  momentum, ", dampening=", dampening);
  UpdateParams p = {};
  p.rule = UpdateRule::kSgd;
  p.lr = lr;
  p.momentum = momentum;
  p.dampening = dampening;
  p.weight_decay = weight_decay;
  p.nesterov = nesterov;
  return p;
}

}  // namespace glue
}  // namespace nibblock
