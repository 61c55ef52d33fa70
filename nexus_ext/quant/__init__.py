"""Packed weights: what they mean, how they are stored, how they are made.

reference     what each op computes, in plain PyTorch
registration  fakes and gradients of the ops
packing       parts to a weight, or to a product with one
formats       which tensors of a checkpoint are one packed weight
"""
