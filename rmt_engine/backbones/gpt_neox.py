"""GPT-NeoX and Pythia: pre-norm, attention and MLP side by side, rotary positions in a part of each head.

Names are GPTNeoXForCausalLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmt_kernels import linear_residual, lm_head, memory, norm_linear, segment_attention
from rmt_kernels.memory import Embeddings
from rmt_kernels.per_slot import Count, Rows
from rmt_kernels.segment_attention import AttentionSpec, KVCache
from rmt_kernels.weights import Linear
from torch import Tensor

from rmt_engine.backbones.common import ACTIVATIONS, Shapes, Weights, layer_norm, linear, require
from rmt_engine.backbones.rotary import halves_order, rope_table
from rmt_engine.errors import CheckpointError

# Older files call the head embed_out. The chain is followed in order, up to a name that the config knows.
TIED = {"embed_out.weight": "lm_head.weight", "lm_head.weight": "gpt_neox.embed_in.weight"}
IGNORED = (
    r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)",
    r"gpt_neox\.(layers\.\d+\.attention\.)?rotary_emb\.inv_freq",
)


def parameter_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a GPTNeoXForCausalLM's parameters; a tied head is left out."""
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: Shapes = {"gpt_neox.embed_in.weight": (vocab, width)}
    norms, linears = ["gpt_neox.final_layer_norm"], []
    for i in range(config["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}."
        norms += [f"{layer}input_layernorm", f"{layer}post_attention_layernorm"]
        attention_bias = config.get("attention_bias", True)
        linears += [
            (f"{layer}attention.query_key_value", 3 * width, width, attention_bias),
            (f"{layer}attention.dense", width, width, attention_bias),
            (f"{layer}mlp.dense_h_to_4h", inner, width, True),
            (f"{layer}mlp.dense_4h_to_h", width, inner, True),
        ]
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, rows, columns, bias in linears:
        shapes |= {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def rotary_dims(config: Mapping[str, Any]) -> int:
    """How many elements of a head are turned."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    dims = int(head_dim * rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25)))
    if dims % 2 or head_dim % 2 or not 0 < dims <= head_dim:
        raise CheckpointError(
            f"the backbone turns {dims} of {head_dim} elements of a head (partial_rotary_factor); "
            "this engine turns an even number of an even number"
        )
    return dims


def _queries_keys_values(config: Mapping[str, Any], packed: Linear) -> tuple[Linear, Linear, Linear]:
    """The packed projection holds q, k and v of one head after the other."""
    heads = config["num_attention_heads"]
    order = halves_order(config["hidden_size"] // heads, rotary_dims(config)).to(packed.weight.device)

    def part(index: int) -> Linear:
        def rows(table: Tensor) -> Tensor:
            mine = table.unflatten(0, (heads, 3, -1))[:, index]  # [H, D, ...]
            return (mine if index == 2 else mine[:, order]).flatten(0, 1).contiguous()

        return Linear(rows(packed.weight), None if packed.bias is None else rows(packed.bias))

    return part(0), part(1), part(2)


class GPTNeoXBlock:
    """hidden + attention(norm(hidden)) + MLP(norm(hidden)); or, not parallel, the MLP after the attention's sum."""

    def __init__(
        self, config: Mapping[str, Any], weights: Weights, index: int, rope: tuple[Tensor, Tensor], backend: str
    ):
        name, eps = f"gpt_neox.layers.{index}.", config["layer_norm_eps"]
        heads = config["num_attention_heads"]
        head_dim = config["hidden_size"] // heads
        self.parallel = config.get("use_parallel_residual", True)
        q, k, v = _queries_keys_values(config, linear(weights, f"{name}attention.query_key_value"))
        last = index == config["num_hidden_layers"] - 1
        first_norm = layer_norm(weights, f"{name}input_layernorm", eps)
        self.qkv = norm_linear.plan_qkv(q, k, v, first_norm, queries_apart=last, backend=backend)
        spec = AttentionSpec(heads, heads, head_dim, causal=True, scale=head_dim**-0.5, rope=rope)
        self.attention = segment_attention.plan(spec, backend=backend)
        self.attention_out = linear_residual.plan(linear(weights, f"{name}attention.dense"), backend=backend)
        self.mlp_in = norm_linear.plan(
            linear(weights, f"{name}mlp.dense_h_to_4h"),
            layer_norm(weights, f"{name}post_attention_layernorm", eps),
            ACTIVATIONS[config["hidden_act"]],
            backend=backend,
        )
        self.mlp_out = linear_residual.plan(linear(weights, f"{name}mlp.dense_4h_to_h"), backend=backend)

    def __call__(self, hidden: Tensor, length: Count, rows: Rows, cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv(hidden, rows)
        attended = self.attention(q, k, v, length=length, start=rows.start, cache=cache)
        summed = self.attention_out(attended, hidden, rows)
        inner = self.mlp_in(hidden, rows) if self.parallel else self.mlp_in(summed)
        return self.mlp_out(inner, summed)


class GPTNeoX:
    """A GPTNeoXForCausalLM over assembled segments."""

    def __init__(self, config: Mapping[str, Any], weights: Weights, backend: str):
        require(config, "hidden_act", *ACTIVATIONS)
        self.kv_heads = config["num_attention_heads"]
        self.head_dim = config["hidden_size"] // self.kv_heads
        tokens = weights["gpt_neox.embed_in.weight"]
        final_norm = layer_norm(weights, "gpt_neox.final_layer_norm", config["layer_norm_eps"])
        cos, sin = (table.to(tokens.device) for table in rope_table(config, self.head_dim, rotary_dims(config)))
        self.read_memory = memory.plan_read(Embeddings(tokens), backend=backend)
        self.embed = memory.plan_embed(Embeddings(tokens), backend=backend)
        self.blocks = [
            GPTNeoXBlock(config, weights, i, (cos, sin), backend) for i in range(config["num_hidden_layers"])
        ]
        self.write_memory = memory.plan_write(final_norm, backend=backend)
        head = Linear(weights.get("lm_head.weight", tokens))
        self.head = lm_head.plan(head, final_norm, backend=backend)
        self.log_probabilities = lm_head.plan_nll(head, final_norm, backend=backend)


build = GPTNeoX
