"""Mistakes in components, for test_planted_components.py: one entry each, seen red when it was written.

``Bug(name, file below src/octavo, text that occurs there once, text put in its place, tests)``: of the tests, or of the
laws that a test runs, at least one must fail. Keep the tests of an entry few and quick: each is run twice.
"""

from __future__ import annotations

from planted import Bug


def laws_of(kind: str) -> str:
    """The test that runs every law on a mixer of the tables, in every use."""
    return f"tests/laws/test_models.py::test_every_mixer_in_every_use[{kind}]"


UNDER_DROPOUT = (
    "tests/unit/nn/test_attention_dropout.py::test_output_and_gradients_equal_plain_attention_under_the_same_mask[33]"
)

BUGS = [
    Bug(
        "reader: a flag for the mask of packed rows", "nn/reader.py",
        "flag = self.reads_all(ctx) and ctx.causal", "flag = ctx.causal",
        (laws_of("attention"),),
    ),
    Bug(
        "window: one token too many under the mask", "nn/contracts.py",
        "allowed = allowed & (key > query - window)", "allowed = allowed & (key >= query - window)",
        # consistently wrong, so that only a stranger can see it
        ("tests/parity/test_nn_parity.py::test_grouped_attention_equals_qwen2",),
    ),
    Bug(
        "shift: the first token of a document sees the document before", "nn/shift.py",
        "return moved * (~ctx.starts)[..., None].to(x.dtype) if ctx.restarts else moved", "return moved",
        ("tests/unit/nn/test_shift.py::test_shift",),
    ),
    Bug(
        "padding: outputs are not moved back", "nn/contracts.py",
        "memory=self.memory), order.argsort(1)", "memory=self.memory), order",
        (laws_of("attention"),),
    ),
    Bug(
        "reader lambda: first tokens at their distance in the text, not in the cache", "nn/reader_lambda.py",
        "turn(q, p.clamp(max=end), rotation)", "turn(q, p, rotation)",
        ("tests/unit/nn/test_long_readers.py::test_lambda_reads_first_and_last_tokens_at_places_of_the_cache",),
    ),
    Bug(
        "reader lambda: the first tokens of the document before", "nn/reader_lambda.py",
        'allowed = (slots >= 0) & (sinks["begins"][:, None] == begin)', "allowed = (slots >= 0)",
        ("tests/laws/test_long_reader_laws.py::test_every_law_on_a_reader_for_long_texts[cache]",),
    ),
    Bug(
        "reader external_memory: local tokens take the memory's places", "nn/reader_memory.py",
        'best = scores.masked_fill(~outside, float("-inf"))', "best = scores",
        ("tests/unit/nn/test_long_readers.py::test_external_memory_merges_the_nearest_keys_before_the_softmax",),
    ),
    Bug(
        "reader longheads: a chunk too far back", "nn/reader_blocks.py",
        "cumsum(-1).flip(-1) - chosen.long()", "cumsum(-1).flip(-1)",
        ("tests/unit/nn/test_long_readers.py::test_longheads_chooses_chunks_per_head_and_counts_positions_along_them",),
    ),
    Bug(
        "reader parallel_windows: the task's positions count on", "nn/reader_parallel.py",
        "min(self.length, self.task) + index - self.task", "index",
        ("tests/unit/nn/test_long_readers.py::test_parallel_windows_have_the_published_positions"
         "_and_do_not_see_each_other",),
    ),
    Bug(
        "mla: the scale of YaRN once, not squared", "nn/latent.py",
        "math.log(self.factor) + 1) ** 2", "math.log(self.factor) + 1) ** 1",
        ("tests/parity/test_mla_parity.py::test_decoding_from_the_latent_alone_is_their_full_pass",),
    ),
    Bug(
        "mla: the shared key is kept unturned", "nn/latent.py",
        "turned, k_rope = rotation(turned), rotation(k_rope)", "turned = rotation(turned)",
        ("tests/parity/test_mla_parity.py::test_in_bf16",),
    ),
    Bug(
        "reader fixed: blocks counted from the row's beginning", "nn/reader_sparse.py",
        "read = self.pattern(ctx.slots[:, :, None] - begin, keys.slots[:, None, :] - begin)",
        "read = self.pattern(ctx.slots[:, :, None], keys.slots[:, None, :])",
        ("tests/laws/test_attention_options.py::test_every_law_on_every_option[reader fixed]",),
    ),
    Bug(
        "reader strided: one token too few", "nn/reader_sparse.py",
        "back.abs() <= self.config.stride", "back.abs() < self.config.stride",
        ("tests/unit/nn/test_reader_sparse.py::test_strided_sets_are_the_papers",),
    ),
    Bug(
        "tiles: what was summed before is not turned to the new maximum", "nn/flash.py",
        "out[:, :, :, rows] = out[:, :, :, rows] * turn + read", "out[:, :, :, rows] = out[:, :, :, rows] + read",
        ("tests/unit/nn/test_flash.py::test_any_tiles_equal_the_plain_form[nothing-2-3]",),
    ),
    Bug(
        "sinks: hidden by the mask", "nn/attend.py",
        "F.pad(mask, (1, 0, 1, 0), value=True)", "F.pad(mask, (1, 0, 1, 0), value=False)",
        ("tests/parity/test_attention_parity.py::test_sinks_are_those_of_gpt_oss[5-sdpa]",),
    ),
    Bug(
        "alibi: nearer keys lose more", "nn/position_bias.py",
        "return -self.scale * self.slopes", "return self.scale * self.slopes",
        ("tests/unit/nn/test_position_bias.py::test_trap_e8_alibi_is_added_to_scores",),
    ),
    Bug(
        "t5: one distance more has a bucket of its own", "nn/position_bias.py",
        "torch.where(distance < single, distance, ranges)", "torch.where(distance <= single, distance, ranges - 1)",
        ("tests/parity/test_position_bias_parity.py::test_buckets_equal_those_of_t5",),
    ),
    Bug(
        "ntk: the base grows by the factor alone", "nn/rope_scaling.py",
        "theta * self.factor ** (dim / (dim - 2))", "theta * self.factor",
        ("tests/unit/nn/test_rope_scaling.py::test_trap_e6_ntk_raises_the_base_so_that_the_slowest_pair_is_interpolated"
         "_exactly",),
    ),
    Bug(
        "dynamic: the text is one token shorter than it is", "nn/rope.py",
        "lengths = positions + 1", "lengths = positions",
        ("tests/parity/test_rope_scaling_parity.py::test_dynamic_gives_the_last_token_what_a_full_pass_of_that_length_gives"
         "[one pass]",),
    ),
    Bug(
        "dynamic: all queries of a pass turn by the first one's base", "nn/reader_raw.py",
        "if frequencies.shape[1] == 1:", "if frequencies.shape[1] >= 1:",
        ("tests/unit/nn/test_rope_scaling.py::test_the_cache_stays_true_while_the_base_grows",),
    ),
    Bug(
        "leaky rerope: a jump at the window's edge", "nn/reader_rerope.py",
        "at * self.slope + (1 - self.slope) * self.within", "at * self.slope + self.within",
        ("tests/unit/nn/test_reader_rerope.py::test_every_pair_turns_by_g_of_the_distance[16.0]",),
    ),
    Bug(
        "shaw: earlier for later tokens", "nn/relative.py",
        "place = (-distance).clamp(-self.clip, self.clip)", "place = distance.clamp(-self.clip, self.clip)",
        ("tests/parity/test_relative_parity.py::test_shaw_without_values_equals_transformers",),
    ),
    Bug(
        "transformer_xl: one bias for content and for distance", "nn/relative.py",
        "q + self.v_r[:, None]", "q + self.u[:, None]",
        ("tests/parity/test_relative_parity.py::test_transformer_xl_equals_transformers",),
    ),
    Bug(
        "relative: probabilities of a clipped distance overwrite each other", "nn/relative.py",
        "sums = sums.scatter_add(", "sums = sums.scatter(",
        ("tests/laws/test_position_variants.py::test_every_law[shaw, near]",),
    ),
    Bug(
        "mamba: states of a document reach into the next", "nn/mamba.py",
        "decay.masked_fill_(starts[..., None, None], 0.0)", "pass",
        (laws_of("mamba"),),
    ),
    Bug(
        "mamba: no gradient from one block to the block before", "nn/mamba.py",
        "carry = torch.addcmul(dborders[i], decays[0], gs[0])", "carry = dborders[i].clone()",
        ("tests/parity/test_mamba_parity.py::test_the_scan_in_blocks_equals_the_steps_with_every_gradient[50]",),
    ),
    Bug(
        "s4d: a chunk's state crosses a document's border", "nn/s4d.py",
        "decay = decay * (local[..., -1] == 0).t()[..., None, None]", "pass",
        ("tests/parity/test_s4d_parity.py::test_over_several_chunks_the_forms_are_twins[documents-auto]",),
    ),
    Bug(
        "convolution: a long kernel reads the document before", "nn/convolution.py",
        "first = blocks[..., :half] * crossing[..., :half].to(x.dtype)", "first = blocks[..., :half]",
        ("tests/parity/test_hyena_parity.py::test_it_is_causal_and_documents_stay_apart_over_long_rows",),
    ),
    Bug(
        "recurrent: backwards over the ends of documents", "nn/recurrent.py",
        "F.pad(ctx.valid[:, 1:] & ~ctx.starts[:, 1:], (0, 1))", "F.pad(ctx.valid[:, 1:], (0, 1))",
        ("tests/parity/test_recurrent_parity.py::test_both_directions_within_documents[sum-gru-auto]",),
    ),
    Bug(
        "gru: backwards nothing is kept of the state before", "nn/through_time.py",
        "dh[t - 1].addcmul_(dh[t], keep[t]).addmm_(outers[t], over)", "dh[t - 1].addmm_(outers[t], over)",
        ("tests/parity/test_recurrent_parity.py::test_whole_rows_and_gradients[gru]",),
    ),
    Bug(
        "rnn: backwards the activation is a line", "nn/through_time.py", "dh[t].mul_(slope[t])", "dh[t].mul_(1)",
        ("tests/parity/test_recurrent_parity.py::test_whole_rows_and_gradients[rnn tanh]",),
    ),
    Bug(
        "gradients by position: padding's place is taken for a token's", "eval/gradients.py",
        "return norms if moved is None else norms.gather(1, moved)", "return norms",
        ("tests/unit/eval/test_gradients.py::test_it_is_the_gradient_of_each_rows_own_last_loss[0-gru]",),
    ),
    Bug(
        "moe: the selection bias leaks into the weights", "nn/moe.py",
        "weights = router.weights_of(logits, scores, chosen, config.order, config.normalise)",
        "weights = router.weights_of(logits, scores + (0 if self.selection_bias is None else self.selection_bias),"
        " chosen, config.order, config.normalise)",
        ("tests/unit/nn/test_moe.py::test_the_bias_changes_who_is_chosen_and_no_weight",
         "tests/parity/test_moe_parity.py::test_deepseek_v3[True-grouped-fp32]"),
    ),
    Bug(
        "moe: capacity off by one", "nn/moe.py",
        "return (place < limit[:, None, None])", "return (place <= limit[:, None, None])",
        ("tests/parity/test_moe_parity.py::test_nllb_drops_the_same_choices",
         "tests/unit/nn/test_moe.py::test_what_overflows_passes_a_block_unchanged_and_is_counted"),
    ),
    Bug(
        "moe: padding is routed and counted", "nn/moe.py",
        "experts = torch.where(ctx.valid[..., None], chosen, E)", "experts = chosen",
        ("tests/parity/test_moe_parity.py::test_the_balance_loss_of_mixtral_and_its_gradient",),
    ),
    Bug(
        "moe: losses of the layers are not trained on", "training/loop.py",
        "sum(further, loss).backward()", "loss.backward()",
        ("tests/unit/train/test_loop_experts.py::test_losses_of_the_layers_are_trained_on_and_are_not_the_loss",),
    ),
    Bug(
        "moe: the selection bias is not saved", "training/optim.py",
        'yield from ((f"model/{name}", tensor) for name, tensor in self.counted)', "yield from ()",
        ("tests/unit/train/test_loop_experts.py::test_the_selection_bias_is_saved_exported_and_loaded",),
    ),
    Bug(
        "moe: a group's gradient is its neighbour's", "nn/grouped.py",
        "torch.mm(grad[start:end].T, x[start:end], out=matrix)",
        "torch.mm(grad[start:end].T, x[:1].expand(end - start, -1), out=matrix)",
        ("tests/unit/nn/test_moe.py::test_grouped_products_and_their_gradients_are_those_of_each_group",),
    ),
    Bug(
        "decay by channel: a new document forgets nothing", "nn/vector_decay.py",
        'masked_fill(starts, float("-inf"))', "masked_fill(starts, 0.0)",
        (laws_of("gla"),),
    ),
    Bug(
        "rwkv6: the present token fades before it is read", "nn/vector_decay.py",
        "into = whole if bonus is None else reset[..., None, :]", "into = whole",
        (laws_of("rwkv6"),),
    ),
    Bug(
        "rwkv4: the largest exponent is not carried over", "nn/rwkv4.py",
        "m = torch.maximum(m + drop_n, end)", "m = end",
        (laws_of("rwkv4"),),
    ),
    Bug(
        "delta rule: what was written fades once more", "nn/delta_rule.py",
        "masked_fill(~past.tril(-1), 0.0)", "masked_fill(~past, 0.0)",
        (laws_of("gated_deltanet"),),
    ),
    Bug(
        "chunked: the state before a chunk fades one token less", "nn/chunked.py",
        "(summed, last - summed, last)", "(summed - summed[..., :1, :], last - summed, last)",
        ("tests/unit/nn/test_chunked.py::test_pieces_joined_by_the_state_are_the_whole",),
    ),
    Bug(
        "chunked: a state outlives its document", "nn/chunked.py",
        "whole = (before == segments[..., -1:])", "whole = (before <= segments[..., -1:])",
        ("tests/laws/test_linear_mixers.py::test_every_law[mamba2, groups]",),
    ),
    Bug(
        "short convolution: a token sees the document before", "nn/short_convolution.py",
        "own[:, back:] == own[:, :-back]", "own[:, back:] >= own[:, :-back]",
        ("tests/laws/test_linear_mixers.py::test_every_law[mamba2, groups]",),
    ),
    Bug(
        "retention: rates of the next head", "nn/retention.py",
        "torch.exp2(-5 - heads)", "torch.exp2(-4 - heads)",
        ("tests/parity/test_retention_parity.py::test_decoding_equals_torchscale",),
    ),
    Bug(
        "mamba2: gate and norm in the other order", "nn/mamba2.py",
        "y = y if self.config.norm_before_gate else y * gate", "y = y * gate if self.config.norm_before_gate else y",
        ("tests/parity/test_mamba2_parity.py::test_decoding_with_a_cache",),
    ),
    Bug(
        "counted: a context reaches into the document before", "predictors/predictor.py",
        "new = np.diff(docs, prepend=docs[0]) != 0", "new = np.zeros(len(docs), bool)",
        ("tests/laws/test_predictor_laws.py::test_a_counted_model_keeps_the_laws_of_models[order 5-packed]",),
    ),
    Bug(
        "counted: the state holds a token less than is read", "predictors/predictor.py",
        'StateField("ring", (), torch.int32, order - 2)', 'StateField("ring", (), torch.int32, order - 3)',
        ("tests/laws/test_predictor_laws.py::test_a_counted_model_keeps_the_laws_of_models[order 5-incremental]",),
    ),
    Bug(
        "noisy channel: letters that changed places are not put back", "channel/edits.py",
        "Edge(at + 2, after + typed,", "Edge(at + 2, typed + after,",
        ("tests/unit/channel/test_noisy_channel.py::test_the_search_finds_what_brute_force_finds[bab-2-False]",),
    ),
    Bug(
        "noisy channel: of two ways to one text the worse is kept", "channel/decode.py",
        "if held[same].score >= path.score:", "if held[same].score <= path.score:",
        ("tests/unit/channel/test_noisy_channel.py::test_the_search_finds_what_brute_force_finds[aabb-2-False]",),
    ),
    Bug(
        "dropout: the gradient of what was dropped", "nn/kernels/tiles_vector.h",
        "kept0 *= m0, kept1 *= m1, slope0 *= m0, slope1 *= m1;", "kept0 *= m0, kept1 *= m1;",
        (UNDER_DROPOUT,),
    ),
    Bug(
        "dropout: before the softmax has its sum", "nn/kernels/tiles_vector.h",
        "sum0 += p0;\n            sum1 += p1;\n            if (draws.least) draws.drop(lane, k0 + row, p0, p1);",
        "if (draws.least) draws.drop(lane, k0 + row, p0, p1);\n            sum0 += p0;\n            sum1 += p1;",
        (UNDER_DROPOUT,),
    ),
    Bug(
        "dropout: every row of a batch drops the same", "nn/kernels/attention.cpp",
        "f.draws.queries(call.dropout.of(b * H + h), q0);", "f.draws.queries(call.dropout.of(h), q0);",
        (UNDER_DROPOUT,),
    ),
    Bug(
        "dropout: both halves of a draw are one", "nn/dropout.py",
        "torch.stack([x & 0xFFFF, x >> 16], -1)", "torch.stack([x & 0xFFFF, x & 0xFFFF], -1)",
        ("tests/unit/nn/test_dropout.py::test_neighbours_are_independent[0.5]",),
    ),
    Bug(
        "dropout: a seed of its own instead of the generator's", "nn/dropout.py",
        "return torch.randint(2**62, (), dtype=torch.int64)", "return torch.tensor(5)",
        ("tests/unit/nn/test_dropout.py::test_a_call_is_one_draw_from_the_generator",),
    ),
    Bug(
        "dropout: what is added gets no gradient", "nn/dropout.py",
        "None, None, grad if ctx.onto else None", "None, None, grad * 0 if ctx.onto else None",
        ("tests/unit/nn/test_dropout.py::test_a_sum_with_something_else_is_the_same_to_the_bit[33-dtype0]",),
    ),
    Bug(
        "families: Falcon's heads are not taken apart by groups", "hub/falcon.py",
        '"qkv", block.mixer.n_kv_heads or block.mixer.n_heads)', '"qkv", 1)',
        ("tests/parity/test_classic_family_parity.py::test_logits_and_every_hidden_state[falcon 40B-none]",),
    ),
    Bug(
        "families: Mamba's gate comes first", "hub/mamba.py",
        '(f"{ours}.up.weight", f"{ours}.gate.weight")', '(f"{ours}.gate.weight", f"{ours}.up.weight")',
        ("tests/parity/test_recurrent_family_parity.py::test_logits_and_every_hidden_state[mamba]",),
    ),
    Bug(
        "families: DeepSeek's columns of the shared key come first", "hub/deepseek.py",
        '(f"{b}.kv_down.{kind}", f"{b}.k_rope.{kind}")', '(f"{b}.k_rope.{kind}", f"{b}.kv_down.{kind}")',
        ("tests/parity/test_expert_families_parity.py::test_logits_and_every_hidden_state[deepseek_v2]",),
    ),
    Bug(
        "families: DeepSeek's tokens choose as many experts as are shared", "hub/deepseek.py",
        '"experts_per_token": whole(hf, "num_experts_per_tok", self)',
        '"experts_per_token": whole(hf, "n_shared_experts", self)',
        ("tests/parity/test_expert_families_parity.py::test_logits_and_every_hidden_state[deepseek_v3 half]",),
    ),
    Bug(
        "families: DeepSeek-V3 without first_k_dense_replace has experts everywhere", "hub/deepseek.py",
        "default_dense, default_scale = 3, 2.5", "default_dense, default_scale = 0, 2.5",
        ("tests/parity/test_expert_families_parity.py::test_a_key_that_is_left_out_means_what_its_class_means[deepseek_v3]",),
    ),
    Bug(
        "families: Qwen-MoE's steps begin at the first layer", "hub/qwen_moe.py",
        "(i + 1) % step == 0 for i", "i % step == 0 for i",
        ("tests/parity/test_expert_families_parity.py::test_names_and_shapes_are_those_of_a_saved_folder"
         "[qwen3_moe steps]",),
    ),
    Bug(
        "families: Qwen2-MoE's windows begin at the second layer", "hub/qwen_moe.py",
        "if i % 2 == 0 and i < last", "if i % 2 == 1 and i < last",
        ("tests/parity/test_expert_families_parity.py::test_a_key_that_is_left_out_means_what_its_class_means"
         "[qwen2_moe sparse]",),
    ),
    Bug(
        "alibi: rounded places count from the row's beginning", "nn/position_bias.py",
        "return keys.slots - torch.where(begins, keys.slots, 0).cummax(1).values", "return keys.slots",
        ("tests/parity/test_classic_family_parity.py::test_rounded_places_count_within_a_document",),
    ),
    Bug(
        "tags: a span goes on into another type", "eval/tags.py",
        'before in ("B", "I") and type_ == type_before', 'before in ("B", "I")',
        ("tests/unit/eval/test_tags.py::test_spans_by_hand",),
    ),
    Bug(
        "tags: the blank before a word carries its tag", "tokenizer/words.py",
        "own = [i for i, id in enumerate(ids) if not self._is_blank(id)] or list(range(len(ids)))",
        "own = list(range(len(ids)))",
        ("tests/unit/data/test_tagged.py::test_the_first_or_last_or_every_piece_carries_the_tag",),
    ),
    Bug(
        "tags: a held-out word counts once for each of its tokens", "data/tagged.py",
        "tags[places[:1] if once else places]", "tags[places]",
        ("tests/unit/data/test_tagged.py::test_the_first_or_last_or_every_piece_carries_the_tag",),
    ),
    Bug(
        "n-grams: what begins a sentence has no count below the highest order", "ngrams/counting.py",
        "return np.where(distinct > 0, distinct, raw)", "return distinct",
        ("tests/parity/test_kenlm_parity.py::test_every_number_of_lmplz[text-3]",),
    ),
    Bug(
        "n-grams of any length: a context reaches into the document before", "ngrams/suffixes.py",
        "np.where(end_place[rows] >= depth - 1, tokens", "np.where(end_place[rows] >= 0, tokens",
        ("tests/unit/ngrams/test_suffixes.py::test_contexts_never_cross_a_document",),
    ),
    Bug(
        "interpolation: mass that stopped above is counted again below", "ngrams/backing_off.py",
        "reach = reach - stopped", "reach = reach * 1",
        ("tests/unit/ngrams/test_smoothing.py::test_em_never_lowers_the_held_out_likelihood[0]",),
    ),
    Bug(
        "back-off: the best token of the shorter context, though it was seen and is rarer here", "ngrams/estimate.py",
        "best[contradicted] = -1", "pass",
        ("tests/unit/ngrams/test_smoothing.py::test_the_best_token_is_searched_for_where_back_off_contradicts_it[stupid_backoff]",),
    ),
    Bug(
        "window: what reads both ways sees no end ahead", "nn/contracts.py",
        "allowed = allowed if causal else allowed & (key < query + window)", "pass",
        ("tests/parity/test_encoder_parity.py::test_a_folder_says_the_same_here_and_there[modernbert-masked]",),
    ),
    Bug(
        "decoder: every block turns by the model's rotation", "models/decoder.py",
        "return {name: found[i] for name, i in self.turns.items()}", "return {name: found[0] for name in self.turns}",
        ("tests/laws/test_encoder_laws.py::test_each_block_turns_by_its_own_scheme",),
    ),
    Bug(
        "classes: the last slot, not the last token", "models/heads.py",
        "flags.shape[1] - 1 - flags.flip(1).argmax(1)", "flags.argmax(1) * 0 + flags.shape[1] - 1",
        ("tests/parity/test_encoder_parity.py::test_a_decoder_reads_its_classes_from_the_last_token[right]",),
    ),
    Bug(
        "masking: every pass hides the same tokens", "data/masking.py",
        "salt = 0 if self.static else epoch + 1", "salt = 0",
        ("tests/unit/data/test_masking.py::test_dynamic_masking_changes_with_the_pass_and_static_does_not",),
    ),
    Bug(
        "masking: special tokens are hidden too", "data/masking.py",
        "< self.probability) & valid & self.usual[tokens]", "< self.probability) & valid",
        ("tests/unit/data/test_masking.py::test_the_shares_are_those_asked_for",),
    ),
    Bug(
        "constraint: only the tokenizer's own way of cutting a text", "infer/constraints.py",
        '"no_forcing": true', '"no_forcing": false',
        ("tests/unit/infer/test_constraints.py::test_any_spelling_of_a_text_is_allowed",),
    ),
    Bug(
        "constraint: the first token is taken for one inside a text", "infer/constraints.py",
        "return all(token in self.special_ids for token in prompt[-PROMPT_TAIL:])", "return False",
        ("tests/unit/infer/test_constraints.py::test_the_first_token_is_held_to_what_it_is_decoded_to",),
    ),
    Bug(
        "annealing: all rows at the temperature of the first", "infer/sampling.py",
        "at = [config.temperature_at(len(ids)) for ids in produced]",
        "at = [config.temperature_at(len(produced[0])) for _ in produced]",
        ("tests/unit/infer/test_sampling.py::test_the_temperature_follows_its_path[linear-wanted0]",),
    ),
    Bug(
        "typical: the most probable tokens, not the most usual", "infer/sampling.py",
        "distance = (-log_p - torch.special.entr(p).sum(-1, keepdim=True)).abs()", "distance = -log_p",
        ("tests/unit/infer/test_sampling.py::test_typical_can_leave_out_the_most_probable_token",),
    ),
    Bug(
        "tools: an end of a call that comes in two parts is missed", "serve/tools.py",
        "self._tried = max(begin, len(self._pending) - len(CLOSE) + 1)", "self._tried = max(begin, len(self._pending))",
        ("tests/unit/serve/test_serve_tools.py::test_a_call_whole_and_streamed",),
    ),
    Bug(
        "best of: the worst are given", "serve/answers.py",
        "key=lambda row: -means[row]", "key=lambda row: means[row]",
        ("tests/unit/serve/test_serve_tools.py::test_the_best_of_several_completions",),
    ),
    Bug(
        "drafts: what was refused may be drawn again", "infer/sampling.py",
        "rest[token] = 0", "rest[token] = rest[token]",
        ("tests/unit/infer/test_drafts.py::test_the_distribution_is_that_without_a_draft",),
    ),
    Bug(
        "drafts: after a drawn one is refused, any other may come", "infer/sampling.py",
        "rest = (rest - drawn_from[i]).clamp(min=0)", "rest[token] = 0",
        ("tests/unit/infer/test_drafts.py::test_the_distribution_is_that_of_the_model_whatever_the_draft_was_drawn_from",),
    ),
    Bug(
        "drafts: a drawn one is judged as if it were certain", "infer/sampling.py",
        "dtype=torch.float64)) * q < float", "dtype=torch.float64)) < float",
        ("tests/unit/infer/test_drafts.py::test_the_distribution_is_that_of_the_model_whatever_the_draft_was_drawn_from",),
    ),
    Bug(
        "drafts: a model guesses without the penalties", "infer/drafts.py",
        "guess(own, some[0].config, prompts, said, streams)",
        "guess(own, SamplingConfig(temperature=some[0].config.temperature), prompts, said, streams)",
        ("tests/unit/infer/test_drafts.py::test_a_model_that_drafts_for_itself_is_always_right",),
    ),
    Bug(
        "drafts: a recurrence is not put back behind what was refused", "infer/memory.py",
        "own[name][slot] = tensor\n        for kept, memory", "pass\n        for kept, memory",
        ("tests/unit/infer/test_drafts.py::test_a_recurrence_is_put_back_and_reads_again",),
    ),
    Bug(
        "native: a window reads one token more", "nn/kernels/decode.cpp",
        "r.slots[m] - window + 1", "r.slots[m] - window",
        ("tests/unit/infer/test_native.py::test_every_step_is_the_models_own[a window-dtype0-1]",),
    ),
    Bug(
        "native: of a long part the first tokens stay in the ring", "nn/kernels/decode.cpp",
        "if (later < r.N && r.begins[later] == r.begins[m]) continue;",
        "if (m >= memory.ring - 1 && r.begins[m - memory.ring + 1] == r.begins[m]) continue;",
        ("tests/unit/infer/test_native_rows.py::test_rings_are_read_the_same_in_parts_of_any_size",),
    ),
    Bug(
        "native: scores are not capped", "nn/kernels/decode_attention.h",
        "const Lanes sum = cap > 0 ? capped(sums(total), cap) : sums(total);", "const Lanes sum = sums(total);",
        ("tests/unit/infer/test_native.py::test_every_step_is_the_models_own[gemma2-dtype0-1]",),
    ),
    Bug(
        "native: every layer turns like the first", "infer/native.py",
        "            scheme if turns else -1,", "            0 if turns else -1,",
        ("tests/unit/infer/test_native.py::test_every_step_is_the_models_own[gemma3-dtype0-1]",),
    ),
    Bug(
        "lookup: what was said before is not remembered", "infer/drafts.py",
        "places.known = max(len(tokens) - 1, 0)", "places.known = len(tokens)",
        ("tests/unit/infer/test_drafts.py::test_lookup_by_an_index_is_the_search",),
    ),
    Bug(
        "threads: an engine leaves torch with one", "infer/threads.py",
        "        torch.set_num_threads(before)", "        pass",
        ("tests/unit/infer/test_threads.py::test_few_numbers_are_for_one_thread",),
    ),
    Bug(
        "to decode: bf16 stays where nothing is fast with it", "language_model.py",
        'fast = best_precision() == "bf16" or not (native.unsuitable(model) or native.library()[1])', "fast = True",
        ("tests/unit/test_language_model.py::test_to_decode_bf16_stays_where_the_native_step_reads_it",),
    ),
    Bug(
        "server: the first token waits for others", "serve/worker.py",
        "        if n < 0:\n            self._hasty.add(job)\n", "",
        ("tests/unit/serve/test_serve_together.py",),
    ),
    Bug(
        "server: a text's tokens overtake those that wait", "serve/worker.py",
        "out = [(job, item) for job, item in self._out if job in self._hasty]",
        "out = [(job, item) for job, item in self._out[-1:] if job in self._hasty]",
        ("tests/unit/serve/test_serve_together.py",),
    ),
]  # fmt: skip
