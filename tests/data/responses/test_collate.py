import pytest
import torch

from diffalign.data.responses.collate import stack_prompts, stack_tokens
from diffalign.data.responses.config import ResponseConfig
from diffalign.data.responses.corruptions.crop import Crop
from diffalign.data.responses.samples import TokenSampleMaker
from diffalign.data.responses.token_weights.changed import Changed
from tests.data.encoders import FAMILIES, encoder, loaded, response_pair, user
from tests.layouts import encoded, solid_image

every_family = pytest.mark.parametrize("family", FAMILIES)
SIZES = [(20, 12), (8, 30), (9, 9)]


def row(name, *, image_count, response):
    return response_pair(
        sample_id=name,
        images=tuple(encoded(solid_image((200, 0, 0), size=size)) for size in SIZES[:image_count]),
        turns=user("<image>" * image_count + "\nWhat is it?"),
        responses={"chosen": response, "rejected": response + " not"},
    )


def samples(family):
    make = TokenSampleMaker(
        config=ResponseConfig(
            path="x", conditions={"crop": Crop()}, weights={"changed": Changed()}
        ),
        views=frozenset({"chosen", "rejected", "chosen@crop", "chosen:changed"}),
        run_seed=0,
        encoder=encoder(family),
    ).make
    rows = [
        row("a", image_count=1, response="a cat"),
        row("b", image_count=0, response="it is a dog that waits"),
        row("c", image_count=3, response="a tall cat"),
    ]
    return [make(one, 0) for one in rows]


@every_family
def test_rows_are_padded_on_the_right_and_hidden_there(family):
    each, pad = samples(family), encoder(family).pad_token_id
    batch = stack_tokens(each, pad)
    assert batch.sample_ids == ("a", "b", "c") and len(batch) == 3
    assert batch.image_counts.tolist() == [1, 0, 3]
    for name, rows in batch.responses.items():
        for i, sample in enumerate(each):
            own = sample.responses[name]
            length = len(own.input_ids)
            assert rows.input_ids[i, :length].tolist() == own.input_ids.tolist()
            assert set(rows.input_ids[i, length:].tolist()) <= {pad}
            assert rows.attention_mask[i].tolist() == [1] * length + [0] * (
                rows.input_ids.shape[1] - length
            )
            assert rows.response_mask.dtype == torch.bool
            assert rows.response_mask[i].nonzero().flatten().tolist() == list(
                range(own.start, length)
            )
            assert rows.input_ids[i, length - 1] == loaded(family)[1].tokenizer.eos_token_id
            for key, values in rows.further.items():
                assert values[i, :length].tolist() == own.further[key].tolist()
    weights = batch.weights["chosen:changed"]
    assert weights.shape == batch.responses["chosen"].input_ids.shape
    assert weights.sum(dim=1).tolist() == pytest.approx([1.0] * 3)


@every_family
def test_images_come_in_reading_order_over_the_batch(family):
    each = samples(family)
    batch = stack_tokens(each, 0)
    for condition in (None, "crop"):
        joined = batch.image_inputs[condition]
        parts = [sample.image_inputs[condition] for sample in each if sample.image_count]
        for key, values in joined.items():
            assert len(values) == sum(len(part[key]) for part in parts)
            assert values.sum() == pytest.approx(sum(float(part[key].sum()) for part in parts))
            assert torch.equal(values[: len(parts[0][key])][..., :1], parts[0][key][..., :1])


@every_family
def test_a_row_means_the_same_in_a_batch_as_alone(family):
    model, _ = loaded(family)
    each = samples(family)

    def logits(chosen):
        batch = stack_tokens(chosen, encoder(family).pad_token_id)
        rows = batch.responses["chosen"]
        with torch.no_grad():
            return model(
                input_ids=rows.input_ids,
                attention_mask=rows.attention_mask,
                **rows.further,
                **batch.image_inputs[None],
            ).logits

    together = logits(each)
    for i, sample in enumerate(each):
        alone = logits([sample])[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-5, rtol=1e-4)


def test_a_batch_of_text_alone_has_no_images():
    batch = stack_tokens(samples("llava")[1:2], 0)
    assert batch.image_inputs == {None: {}, "crop": {}}
    assert batch.image_counts.tolist() == [0]


@every_family
def test_prompts_are_padded_on_the_left_and_generate_as_they_would_alone(family):
    model, _ = loaded(family)
    chat = encoder(family)
    prompts = [
        chat.prompt(user("<image>\nWhy?"), [solid_image((200, 0, 0), size=SIZES[0])]),
        chat.prompt(user("Is it a cat or a dog? Say so."), []),
        chat.prompt(
            user("<image><image>\nA?"), [solid_image((0, 9, 200), size=s) for s in SIZES[1:]]
        ),
    ]

    def responses(some):
        inputs = stack_prompts(some, chat.pad_token_id)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    for batched, prompt in zip(responses(prompts), prompts, strict=True):
        (alone,) = responses([prompt])
        assert batched[: len(alone)] == alone  # one that ends early is padded
