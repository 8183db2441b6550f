// Every operator's schema, one line each. Mutated arguments are marked (a!). The CPU bodies are
// registered in csrc/<op>/torch_cpu.cpp; fakes and autograd live in python/nibblock/ops/<op>.py,
// because the stable ABI has neither.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(nibblock, m) {
  // clang-format off
  m.def("int4_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int group_size, int bits, bool affine, ScalarType scale_dtype, str compute) -> Tensor");
  m.def("_int4_linear_forward(Tensor x, Tensor packed, Tensor? bias, int format) -> Tensor");
  m.def("int4_linear_dx(Tensor grad, Tensor packed, int in_features, int group_size, int bits, bool affine, ScalarType scale_dtype, str compute) -> Tensor");
  m.def("int4_dequantize(Tensor packed, int out_features, int in_features, int group_size, int bits, bool affine, ScalarType scale_dtype, ScalarType dtype) -> Tensor");
  m.def("int4_embedding(Tensor indices, Tensor packed, int num_embeddings, int embedding_dim, int group_size, int bits, bool affine, ScalarType scale_dtype, ScalarType dtype) -> Tensor");
  m.def("block_sparse_linear(Tensor x, Tensor values, Tensor layout, Tensor? bias, Tensor? y0, int out_features, int block) -> Tensor");
  m.def("_block_sparse_linear_forward(Tensor x, Tensor values, Tensor layout, Tensor? bias, Tensor? y0, int out_features, int block) -> Tensor");
  m.def("block_sparse_linear_dx(Tensor grad, Tensor values, Tensor layout, int in_features, int block) -> Tensor");
  m.def("block_weight_grad(Tensor grad, Tensor x, Tensor layout, int block, ScalarType dtype) -> Tensor");
  m.def("int4_block_sparse_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int group_size, int bits, bool affine, ScalarType scale_dtype, str compute, Tensor values, Tensor layout, int block, Tensor? lora_a, Tensor? lora_c) -> Tensor");
  m.def("_int4_block_sparse_linear_forward(Tensor x, Tensor packed, Tensor? bias, int out_features, int group_size, int bits, bool affine, ScalarType scale_dtype, str compute, Tensor values, Tensor layout, int block, Tensor? lora_a, Tensor? lora_c) -> Tensor");
  m.def("int4_block_sparse_linear_dx(Tensor grad, Tensor packed, int in_features, int group_size, int bits, bool affine, ScalarType scale_dtype, str compute, Tensor values, Tensor layout, int block, Tensor? lora_a, Tensor? lora_c) -> Tensor");
  m.def("_rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("_rms_norm_forward(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("_rms_norm_grad(Tensor grad, Tensor x, Tensor weight, float eps, bool wants_weight) -> (Tensor, Tensor)");
  m.def("_add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("_rotated(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor");
  m.def("_rotated_forward(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor");
  m.def("_silu_product(Tensor gate, Tensor up) -> Tensor");
  m.def("_silu_product_forward(Tensor gate, Tensor up) -> Tensor");
  m.def("_silu_product_grad(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("_softmax_grad_(Tensor(a!) scores, Tensor labels) -> Tensor");
  m.def("_int4_siblings(Tensor x, Tensor? norm_weight, float eps, Tensor[] packed, Tensor[] biases, int[] formats, Tensor? cos, Tensor? sin, int heads) -> Tensor");
  m.def("_int4_mlp(Tensor x, Tensor[] packed, Tensor[] biases, int[] formats) -> Tensor");
  m.def("_int4_layer_end(Tensor query, Tensor key, Tensor value, float scale, Tensor hidden, Tensor norm_weight, float eps, Tensor[] packed, Tensor[] biases, int[] formats) -> Tensor");
  m.def("_attend(Tensor query, Tensor key, Tensor value, float scale) -> Tensor");
  m.def("_causal_attention(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor, Tensor)");
  m.def("_causal_attention_grad(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("block_scores_(Tensor(a!) scores, Tensor(b!)? movement, Tensor grad, Tensor x, Tensor? weight, int block, int sketch, int seed) -> ()");
  m.def("block_gain_(Tensor(a!) gain, Tensor(b!) squares, Tensor grad, Tensor x, int block) -> ()");
  m.def("masked_adamw_block_(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] ages, Tensor(e!)[] weights, Tensor[] blocks, int block, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? multiplier, Tensor? found_inf) -> ()");
  m.def("masked_adamw_flat_(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? multiplier, Tensor? found_inf) -> ()");
  m.def("masked_adamw_bool_(Tensor(a!)[] params, Tensor[] grads, Tensor[] masks, Tensor[] offsets, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? multiplier, Tensor? found_inf) -> ()");
  m.def("masked_sgd_block_(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] ages, Tensor(d!)[] weights, Tensor[] blocks, int block, float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, Tensor? multiplier, Tensor? found_inf) -> ()");
  m.def("masked_sgd_flat_(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] momenta, Tensor(c!)[] steps, float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, Tensor? multiplier, Tensor? found_inf) -> ()");
  m.def("masked_sgd_bool_(Tensor(a!)[] params, Tensor[] grads, Tensor[] masks, Tensor[] offsets, Tensor(b!)[] momenta, Tensor(c!)[] steps, float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, Tensor? multiplier, Tensor? found_inf) -> ()");
  m.def("_fetch_lines(Tensor addresses) -> ()");
  m.def("muon_direction_(Tensor(a!)[] out, Tensor[] grads, Tensor(b!)[] momenta, float momentum, bool nesterov, int steps, bool maximize, Tensor? multiplier, Tensor? found_inf) -> ()");
  m.def("masked_grad_bool_(Tensor(a!)[] grads, Tensor[] masks, Tensor? multiplier, float max_norm) -> Tensor");
  m.def("masked_grad_block_(Tensor(a!)[] grads, Tensor[] blocks, int block, Tensor? multiplier, float max_norm) -> Tensor");
  m.def("grad_norm(Tensor[] grads, Tensor? multiplier) -> Tensor");
  m.def("prox_blocks_(Tensor(a!)[] values, Tensor[] origins, Tensor[] thresholds) -> Tensor");
  // clang-format on
}
