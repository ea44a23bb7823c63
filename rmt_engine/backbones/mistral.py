"""Mistral: Llama without biases. Names are MistralForCausalLM's.

Its sliding window bounds the rows of a segment (`RMTConfig`): up to the window, every row sees all rows before it, and
it is Llama's attention.
"""

from rmt_engine.backbones.llama import IGNORED, TIED, Llama, llama_shapes

__all__ = ["IGNORED", "TIED", "build", "parameter_shapes"]

parameter_shapes = llama_shapes
build = Llama
