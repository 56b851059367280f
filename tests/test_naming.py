"""What names of weights tell."""

import pytest

from lexibit.naming import in_order, kind_of, layer_of

KINDS = {
    "bert.encoder.layer.3.attention.self.query.weight": "query",
    "bert.encoder.layer.3.attention.self.key.weight": "key",
    "bert.encoder.layer.3.attention.self.value.weight": "value",
    "bert.encoder.layer.3.attention.output.dense.weight": "attention output",
    "bert.encoder.layer.3.intermediate.dense.weight": "intermediate",
    "bert.encoder.layer.3.output.dense.weight": "output",
    "bert.embeddings.word_embeddings.weight": "embeddings",
    "embeddings.word_embeddings.weight": "embeddings",
    "bert.pooler.dense.weight": "pooler",
    "distilbert.transformer.layer.0.attention.q_lin.weight": "query",
    "distilbert.transformer.layer.0.attention.out_lin.weight": "attention output",
    "distilbert.transformer.layer.0.ffn.lin1.weight": "intermediate",
    "distilbert.transformer.layer.0.ffn.lin2.weight": "output",
    "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense.weight": "attention output",
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": "intermediate",
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight": "output",
    "transformer.h.0.attn.c_attn.weight": "query, key, value",
    "transformer.h.0.attn.c_proj.weight": "attention output",
    "transformer.h.0.mlp.c_fc.weight": "intermediate",
    "transformer.h.0.mlp.c_proj.weight": "output",
    "transformer.wte.weight": "embeddings",
    "model.layers.0.self_attn.q_proj.weight": "query",
    "model.layers.0.self_attn.o_proj.weight": "attention output",
    "model.layers.0.mlp.gate_proj.weight": "intermediate",
    "model.layers.0.mlp.down_proj.weight": "output",
    "model.embed_tokens.weight": "embeddings",
    "model.decoder.layers.0.encoder_attn.k_proj.weight": "cross key",
    "decoder.block.0.layer.1.EncDecAttention.o.weight": "cross attention output",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "query",
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "intermediate",
    "rnns.0.weight_hh_l0": "hidden state",
    "lm_head.weight": "lm_head",
    "weight": "weight",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items(), ids=KINDS)
def test_the_kind_of_a_weight_is_read_from_its_name(name, kind):
    assert kind_of(name) == kind


def test_the_layer_is_what_stands_under_a_number():
    assert layer_of("bert.encoder.layer.3.output.dense.weight") == "bert.encoder.layer.3"
    assert layer_of("bert.pooler.dense.weight") == "bert.pooler"
    assert layer_of("lstm.weight_hh_l1") == "lstm.l1"
    assert layer_of("weight") == "weight"


def test_weights_stand_as_in_models():
    names = ["pooler.dense.weight", "layer.10.a.weight", "layer.2.a.weight", "embeddings.x.weight"]
    assert sorted(names, key=in_order) == names[::-1]
