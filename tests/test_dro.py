from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import QUERIES, SAFETY, build, chat, embedded, plain_states, relative, said
from torch.nn import functional as F

from analysis_lib.analysis.directions import Direction
from analysis_lib.analysis.space import AnchorSpace
from analysis_lib.collect.responses import sample_responses
from analysis_lib.collect.states import hidden_states
from analysis_lib.model import forward
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
from analysis_lib.model.soft_prompt import SoftPrompt, SoftPromptError, embed_text
from analysis_lib.store.batches import StoreDamage, StoreError
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import ls
from analysis_lib.train import dro, loop
from analysis_lib.train.dro import DROConfig, Geometry, dro_loss, train_dro
from analysis_lib.train.tuning import PromptTuningConfig, train_prompt_tuning

QUICK = DROConfig(epochs=2, batch_size=3, learning_rate=1e-3)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def geometry_for(model, k=3):
    """A space and two directions for a model, of its own states."""
    states = hidden_states(model, QUERIES, {"none": "", "default": SAFETY}).at()[0]
    rng = np.random.default_rng(1)
    return (
        AnchorSpace.fit(states, k=k),
        Direction("refusal", rng.normal(size=k), 0.1),
        Direction("harmfulness", rng.normal(size=k), -0.2),
    )


@pytest.fixture(scope="module")
def qwen():
    model = chat("qwen2")
    return model, *geometry_for(model)


@pytest.fixture(params=["one pack", "many packs"])
def packs(request, monkeypatch):
    """Rows laid out as one sequence, and as many."""
    if request.param == "many packs":
        monkeypatch.setattr(forward, "PACK_TOKENS", {"cpu": 30, "cuda": 30})


def forbid_training(monkeypatch):
    def trained(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(torch.optim, "AdamW", trained)


# ----------------------------------------------------------------------------------------------------------- the loss


def test_loss_of_a_hand_worked_case():
    """d = 3, k = 1, basis = identity: changes (1, 2, 0) of a harmful and (-2, 0, 4) of a harmless query."""
    geometry = Geometry(
        torch.tensor([5.0, 5.0, 5.0]), torch.eye(3), torch.tensor([2.0]), torch.tensor([-1.0])
    )
    base = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    states = base + torch.tensor([[1.0, 2.0, 0.0], [-2.0, 0.0, 4.0]])
    harmful = torch.tensor([1.0, 0.0])
    refusal = (
        math.log1p(math.exp(-2)) + math.log1p(math.exp(-4))
    ) / 2  # logits 2 (target 1) and -4 (target 0)
    harmfulness = (
        math.log1p(math.exp(1)) + math.log1p(math.exp(2))
    ) / 2  # logits -1 (target 1) and 2 (target 0)
    norm = (4 + 0 + 0 + 16) / 4
    loss, parts = dro_loss(states, base, harmful, geometry, DROConfig())
    assert parts["refusal"] == pytest.approx(refusal, rel=1e-6)
    assert parts["harmfulness"] == pytest.approx(harmfulness, rel=1e-6)
    assert parts["norm"] == pytest.approx(norm, rel=1e-6)
    assert (
        loss.item()
        == parts["loss"]
        == pytest.approx(refusal + 0.01 * harmfulness + 0.001 * norm, rel=1e-6)
    )
    weighted = DROConfig(weight_refusal=0.5, weight_harmfulness=2.0, weight_norm=0.0)
    assert dro_loss(states, base, harmful, geometry, weighted)[1]["loss"] == pytest.approx(
        0.5 * refusal + 2 * harmfulness, rel=1e-6
    )


def test_loss_depends_on_the_basis_and_not_on_the_mean():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    base, states = (torch.tensor(rng.normal(size=(5, 6)), dtype=torch.float32) for _ in range(2))
    harmful = torch.tensor([1.0, 0, 1, 0, 0])
    weights = [torch.tensor(rng.normal(size=2), dtype=torch.float32) for _ in range(2)]
    turned = Geometry(torch.zeros(6), torch.tensor(basis, dtype=torch.float32), *weights)
    plain = Geometry(torch.ones(6), torch.eye(6), *weights)
    T = torch.tensor(basis, dtype=torch.float32)
    a = dro_loss(states, base, harmful, turned, DROConfig())[1]
    b = dro_loss(states @ T, base @ T, harmful, plain, DROConfig())[1]
    assert a == pytest.approx(b, rel=1e-4)
    assert a != pytest.approx(dro_loss(states, base, harmful, plain, DROConfig())[1], rel=1e-2)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3", "mamba"])
def test_training_follows_the_plain_gradient(family, packs):
    """Steps of AdamW on the mean loss of full, unshared forward passes, gradients clipped after backward; in float64."""
    model = build(family, dtype=torch.float64)
    space, refusal, harmfulness = geometry_for(chat(family))
    config = DROConfig(
        epochs=4, batch_size=50, learning_rate=0.02, weight_norm=0.1, max_grad_norm=0.04
    )
    basis, *weights = (torch.tensor(a) for a in (space.basis, refusal.weight, harmfulness.weight))
    texts, target = QUERIES["text"].tolist(), torch.tensor(QUERIES["harmful"].to_numpy(float))
    rows = model.render(texts, SoftPrompt.from_text(model, SAFETY, name="s"))
    base = torch.stack([plain_states(model, r, (-1,))[0] for r in model.render(texts, SAFETY)])
    soft = torch.nn.Parameter(torch.tensor(embed_text(model, SAFETY), dtype=torch.float64))
    optimizer = torch.optim.AdamW([soft], lr=config.learning_rate)
    losses, norms = [], []
    for _ in range(config.epochs):
        optimizer.zero_grad()
        outs = [
            model.model(
                inputs_embeds=embedded(model, r, soft), output_hidden_states=True, use_cache=False
            )
            for r in rows
        ]
        change = (torch.stack([out.hidden_states[-1][0, -1] for out in outs]) - base) @ basis
        terms = [
            F.binary_cross_entropy_with_logits(change[:, :3] @ weight, target) for weight in weights
        ]
        loss = terms[0] + 0.01 * terms[1] + 0.1 * change[:, 3:].pow(2).mean()
        loss.backward()
        losses.append(loss.item())
        norms.append(float(soft.grad.norm()))
        soft.grad *= min(1, config.max_grad_norm / norms[-1])
        optimizer.step()
    learned = train_dro(model, QUERIES, SAFETY, space, refusal, harmfulness, config)
    assert max(norms) > 1.2 * config.max_grad_norm, "clipping takes part"
    assert learned.history["loss"].tolist() == pytest.approx(losses, rel=1e-4)
    assert learned.history["gradient_norm"].tolist() == pytest.approx(norms, rel=1e-4)
    assert np.abs(learned.embeddings - soft.detach().numpy()).max() < 1e-5
    assert np.abs(learned.embeddings - embed_text(model, SAFETY)).max() > 0.02


@pytest.mark.parametrize(
    ("family", "dtype", "limit"),
    [
        ("qwen2", torch.float64, 1e-6),
        ("mamba", torch.float64, 1e-6),
        ("gemma2", torch.float64, 1e-5),  # its norms compute in float32 whatever the dtype
        ("mixtral", torch.float32, 1e-4),  # its experts do not compute in float64
    ],
)
def test_shared_and_plain_gradients_agree(family, dtype, limit):
    model = build(family, dtype=dtype)
    space, refusal, harmfulness = geometry_for(chat(family))
    geometry = Geometry(
        *(
            torch.tensor(a, dtype=dtype)
            for a in (space.mean, space.basis, refusal.weight, harmfulness.weight)
        )
    )
    start = SoftPrompt.from_text(model, SAFETY, name="s")
    rows = model.render(QUERIES["text"].tolist(), start)
    harmful = torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=dtype)
    base = torch.zeros(6, model.hidden_size, dtype=dtype)
    gradients = []
    for shared in (True, False):
        soft = torch.nn.Parameter(torch.tensor(start.embeddings, dtype=dtype))
        if shared:
            with model.forward.soft_tokens(soft):
                states = dro.last_states(model.forward, [r.ids for r in rows])[0][:, 0]
        else:
            outs = [
                model.model(
                    inputs_embeds=embedded(model, r, soft),
                    output_hidden_states=True,
                    use_cache=False,
                )
                for r in rows
            ]
            states = torch.stack([out.hidden_states[-1][0, -1] for out in outs])
        dro_loss(states, base, harmful, geometry, DROConfig(weight_norm=1.0))[0].backward()
        gradients.append(soft.grad)
    assert gradients[1].abs().max() > 0 and relative(*gradients) <= limit


def test_training_starts_at_the_text_and_lowers_its_loss(qwen):
    model, *geometry = qwen
    got = train_dro(
        model,
        QUERIES,
        SAFETY,
        *geometry,
        DROConfig(epochs=15, batch_size=50, learning_rate=5e-3),
        name="mine",
    )
    assert got.name == "mine" and got.start_text == SAFETY and got.model == model.fingerprint
    assert (
        got.embeddings.dtype == np.float32
        and got.embeddings.shape == embed_text(model, SAFETY).shape
    )
    history = got.history
    assert history["refusal"][0] == pytest.approx(math.log(2), rel=1e-4)  # nothing has moved yet
    assert (
        history["harmfulness"][0] == pytest.approx(math.log(2), rel=1e-4)
        and history["norm"][0] < 1e-8
    )
    assert history["loss"].iloc[-1] < 0.6 * history["loss"][0]
    weights = {"refusal": 1, "harmfulness": 0.01, "norm": 0.001}
    assert np.allclose(
        history["loss"], sum(w * history[name] for name, w in weights.items()), rtol=1e-5
    )
    # what was learned does what the loss says: refusal logit up for harmful, down for harmless queries
    space, refusal, _ = geometry
    states = hidden_states(model, QUERIES, {"text": SAFETY, "soft": got})
    logits = [refusal.logit(space.transform(states.at(prompt=p)[0])) for p in ("text", "soft")]
    change = logits[1] - logits[0]
    assert (
        change[QUERIES["harmful"].to_numpy(bool)].mean()
        > 0.3
        > -0.3
        > change[~QUERIES["harmful"].to_numpy(bool)].mean()
    )


def test_history_has_one_row_a_step(qwen):
    model, *geometry = qwen
    seen = []
    got = train_dro(
        model,
        QUERIES,
        SAFETY,
        *geometry,
        replace(QUICK, epochs=3, batch_size=2),
        on_step=lambda losses, e: seen.append((losses, e)),
    )
    assert got.history["step"].tolist() == list(range(1, 10)) and got.history["epoch"].tolist() == [
        1,
        1,
        1,
        2,
        2,
        2,
        3,
        3,
        3,
    ]
    assert got.history.columns.tolist() == [
        "step",
        "epoch",
        "loss",
        "refusal",
        "harmfulness",
        "norm",
        "gradient_norm",
    ]
    assert got.history.to_dict("records") == [losses for losses, _ in seen]
    assert np.array_equal(seen[-1][1], got.embeddings) and not np.array_equal(
        seen[0][1], seen[1][1]
    )
    assert got.config == {"method": "DRO", "learning_rate": 1e-3, "epochs": 3, "batch_size": 2, "weight_refusal": 1.0,
                          "weight_harmfulness": 0.01, "weight_norm": 0.001, "max_grad_norm": 1.0, "seed": 42}  # fmt: skip


def test_a_stopped_training_keeps_what_was_learned_and_is_not_taken_for_a_finished_one(qwen, store):
    model, *geometry = qwen
    config = replace(QUICK, epochs=1, batch_size=1)
    steps = []

    def stop(losses, embeddings):
        steps.append(embeddings)
        return len(steps) == 2

    got = train_dro(model, QUERIES, SAFETY, *geometry, config, on_step=stop, store=store)
    assert len(got.history) == 2 and np.array_equal(got.embeddings, steps[1])
    whole = train_dro(model, QUERIES, SAFETY, *geometry, config, store=store)
    assert len(whole.history) == 6
    assert np.array_equal(whole.history["loss"][:2], got.history["loss"])


def test_equal_runs_are_equal_and_others_are_not(qwen):
    model, *geometry = qwen
    first, again = (train_dro(model, QUERIES, SAFETY, *geometry, QUICK) for _ in range(2))
    assert np.array_equal(first.embeddings, again.embeddings) and first.history.equals(
        again.history
    )
    for change in ({"seed": 1}, {"learning_rate": 2e-3}, {"batch_size": 2}, {"epochs": 3}):
        assert not np.array_equal(
            train_dro(model, QUERIES, SAFETY, *geometry, replace(QUICK, **change)).embeddings,
            first.embeddings,
        )
    assert not np.array_equal(
        train_dro(model, QUERIES, "Be safe.", *geometry, QUICK).embeddings[:3], first.embeddings[:3]
    )


def test_weights_switch_losses_off(qwen):
    """With one loss alone, its value falls; a weight of 0 leaves no trace of the others in the gradient."""
    model, *geometry = qwen
    for name in ("refusal", "harmfulness"):
        alone = {f"weight_{n}": float(n == name) for n in ("refusal", "harmfulness", "norm")}
        history = train_dro(
            model, QUERIES, SAFETY, *geometry, DROConfig(epochs=8, learning_rate=5e-3, **alone)
        ).history
        assert (
            np.allclose(history["loss"], history[name])
            and history[name].iloc[-1] < 0.9 * history[name][0]
        )
    space, refusal, harmfulness = geometry
    other = replace(harmfulness, weight=-harmfulness.weight)
    off = replace(QUICK, weight_harmfulness=0.0)
    a, b = (
        train_dro(model, QUERIES, SAFETY, space, refusal, h, off).embeddings
        for h in (harmfulness, other)
    )
    assert np.array_equal(a, b)
    free, held = (
        train_dro(
            model,
            QUERIES,
            SAFETY,
            *geometry,
            DROConfig(epochs=15, learning_rate=5e-3, weight_norm=w),
        )
        .history["norm"]
        .iloc[-1]
        for w in (0.0, 10.0)
    )
    assert held < 0.5 * free


def test_unlabelled_queries_take_no_part(qwen):
    model, *geometry = qwen
    more = pd.concat(
        [
            QUERIES,
            QUERIES[:2].assign(
                query_id=["u", "v"],
                text=["Is it?", "Why?"],
                harmful=pd.array([None] * 2, dtype="boolean"),
            ),
        ]
    )
    a, b = (
        train_dro(model, queries, SAFETY, *geometry, QUICK).embeddings
        for queries in (QUERIES, more)
    )
    assert np.array_equal(a, b)


def test_the_model_is_left_as_found(qwen):
    model, *geometry = qwen
    base, before = (
        model.model.get_input_embeddings(),
        {k: v.clone() for k, v in model.model.state_dict().items()},
    )
    train_dro(model, QUERIES, SAFETY, *geometry, QUICK)
    with pytest.raises(KeyboardInterrupt):
        train_dro(
            model,
            QUERIES,
            SAFETY,
            *geometry,
            QUICK,
            on_step=lambda *a: (_ for _ in ()).throw(KeyboardInterrupt),
        )
    assert model.model.get_input_embeddings() is base
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    assert all(p.grad is None for p in model.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_bfloat16_model_trains_float32_embeddings(dtype):
    model = build("qwen2", dtype=dtype)
    got = train_dro(
        model,
        QUERIES,
        SAFETY,
        *geometry_for(chat("qwen2")),
        replace(QUICK, learning_rate=1e-5, epochs=1, batch_size=50),
    )
    moved = np.abs(got.embeddings - embed_text(model, SAFETY))
    assert (
        got.embeddings.dtype == np.float32 and 0 < moved.max() < 2e-5
    )  # steps far below bfloat16's spacing are kept


def test_finished_trainings_are_read_from_the_store(qwen, store, monkeypatch):
    model, *geometry = qwen
    first = train_dro(model, QUERIES, SAFETY, *geometry, QUICK, name="a", store=store)
    others = [
        (replace(QUICK, seed=1), QUERIES, SAFETY, geometry),
        (QUICK, QUERIES[:4], SAFETY, geometry),
        (QUICK, QUERIES.assign(harmful=~QUERIES["harmful"]), SAFETY, geometry),
        (QUICK, QUERIES, "Be safe.", geometry),
        (QUICK, QUERIES, SAFETY, [geometry[0], geometry[2], geometry[1]]),
        (QUICK, QUERIES, SAFETY, [replace(geometry[0], mean=geometry[0].mean + 1), *geometry[1:]]),
        (
            QUICK,
            QUERIES,
            SAFETY,
            [replace(geometry[0], basis=geometry[0].basis[:, ::-1].copy()), *geometry[1:]],
        ),
    ]
    with monkeypatch.context() as patch:
        forbid_training(patch)
        again = train_dro(
            model, QUERIES, SAFETY, *geometry, QUICK, name="b", store=Store(store.folder)
        )
        assert again.name == "b" and np.array_equal(again.embeddings, first.embeddings)
        pd.testing.assert_frame_equal(again.history, first.history, check_exact=True)
        assert again.config == first.config and again.start_text == SAFETY
        steps = []
        train_dro(
            model,
            QUERIES,
            SAFETY,
            *geometry,
            QUICK,
            store=store,
            on_step=lambda *_: steps.append(1),
        )
        assert steps == []
        for config, queries, prompt, (space, refusal, harmfulness) in others:
            with pytest.raises(AssertionError, match="trained again"):
                train_dro(model, queries, prompt, space, refusal, harmfulness, config, store=store)
        with pytest.raises(AssertionError, match="trained again"):
            train_dro(build("qwen2", seed=1), QUERIES, SAFETY, *geometry, QUICK, store=store)


def test_a_training_under_a_forward_hook_is_neither_read_nor_kept(store):
    """It is another model's, and no key tells."""
    model = build("qwen2")
    geometry = geometry_for(model)
    clean = train_dro(model, QUERIES, SAFETY, *geometry, QUICK, store=store)
    kept = ls(store)
    handle = model.forward.blocks[1].register_forward_hook(
        lambda module, inputs, output: output * 1.5
    )
    for config in (QUICK, replace(QUICK, seed=1)):
        with pytest.warns(
            UserWarning, match="has a forward hook.*nothing is read from the store and nothing kept"
        ):
            steered = train_dro(model, QUERIES, SAFETY, *geometry, config, store=store)
        assert not np.array_equal(steered.embeddings, clean.embeddings)
    handle.remove()
    assert ls(store).equals(kept)


def test_found_trainings_load_no_weights(tmp_path, monkeypatch):
    made, store = chat("qwen2"), Store(tmp_path / "store")
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    geometry, tuning = geometry_for(made), PromptTuningConfig(epochs=1, batch_size=2)

    def train():
        model = ChatModel.load(str(tmp_path / "model"), dtype="float32")
        dro = train_dro(model, QUERIES, SAFETY, *geometry, QUICK, store=store)
        return dro, train_prompt_tuning(model, QUERIES, JUDGED, SAFETY, tuning, store=store)

    first = train()
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    for one, other in zip(first, train(), strict=True):
        assert np.array_equal(one.embeddings, other.embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["DRO", "prompt tuning"])
def test_an_interrupted_training_goes_on_where_it_was(method, dtype, store, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    model = build("qwen2", dtype=dtype)
    geometry, seen = geometry_for(model), []

    def train(at=10**9, kept=store):
        def step(losses, embeddings):
            seen.append(losses["step"])
            if losses["step"] == at:
                raise KeyboardInterrupt

        if method == "DRO":
            config = DROConfig(epochs=4, batch_size=3, learning_rate=1e-3)
            return train_dro(
                model, QUERIES, SAFETY, *geometry, config, name="a", on_step=step, store=kept
            )
        tuning = PromptTuningConfig(epochs=4, batch_size=1)
        return train_prompt_tuning(
            model, QUERIES, JUDGED, SAFETY, tuning, name="a", on_step=step, store=kept
        )

    unbroken = train(kept=None)
    n = len(unbroken.history)
    assert seen == list(range(1, n + 1)) and n % 4 == 0
    per_epoch = n // 4
    for at, first in (
        (per_epoch + 1, 1),
        (3 * per_epoch, per_epoch + 1),
        (2 * per_epoch + 1, 2 * per_epoch + 1),
    ):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            train(at)
        assert seen[0] == first
        assert ls(store).set_index("kind")["layers"].to_dict() == {"checkpoints": "checkpoint"}
        assert ls(store)["files"].tolist() == [1]  # the last checkpoint alone
    seen.clear()
    resumed = train()
    assert seen[0] == 2 * per_epoch + 1
    assert np.array_equal(resumed.embeddings, unbroken.embeddings)
    pd.testing.assert_frame_equal(resumed.history, unbroken.history, check_exact=True)
    assert ls(store)["layers"].tolist() == ["soft tokens"] * 2 and ls(store)["files"].tolist() == [
        1,
        1,
    ]


def test_a_checkpoint_that_cannot_be_kept_ends_no_training(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    model, *geometry = qwen
    with pytest.warns(UserWarning) as told:
        got = train_dro(
            model, QUERIES, SAFETY, *geometry, QUICK, name="mine", store=Broken(tmp_path)
        )
    assert [str(w.message).partition(":")[0] for w in told] == [
        "no checkpoint of the training of 'mine' is kept", "the training of 'mine' is returned but not kept"
    ]  # fmt: skip
    assert len(got.history) == 4


def test_a_damaged_checkpoint_is_told_and_the_training_begins_anew(qwen, store, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    model, *geometry = qwen

    def stop(losses, embeddings):
        return losses["step"] == 3

    train_dro(model, QUERIES, SAFETY, *geometry, QUICK, store=store, on_step=stop)
    (file,) = (store.folder / "v1" / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.warns(StoreDamage, match="checksum"):
        got = train_dro(model, QUERIES, SAFETY, *geometry, QUICK, store=Store(store.folder))
    assert np.array_equal(
        got.embeddings, train_dro(model, QUERIES, SAFETY, *geometry, QUICK).embeddings
    )


def test_a_training_is_returned_where_it_cannot_be_kept(qwen, tmp_path):
    model, *geometry = qwen
    with pytest.warns(
        UserWarning,
        match=r"the training of 'mine' is returned but not kept: cannot write to the store",
    ):
        got = train_dro(
            model, QUERIES, SAFETY, *geometry, QUICK, name="mine", store=Broken(tmp_path / "empty")
        )
    assert np.array_equal(
        got.embeddings, train_dro(model, QUERIES, SAFETY, *geometry, QUICK).embeddings
    )


class Broken(Store):
    """A disk that is full by the time a training ends."""

    def write_states(self, *args, **kwargs):
        raise StoreError("cannot write to the store: no space is left")

    write_checkpoint = write_states


def test_bad_trainings_are_refused(qwen):
    model, space, refusal, harmfulness = qwen
    for queries in (QUERIES[QUERIES["harmful"]], QUERIES[~QUERIES["harmful"]], QUERIES[:0]):
        with pytest.raises(ValueError, match="queries of both classes"):
            train_dro(model, queries, SAFETY, space, refusal, harmfulness, QUICK)
    with pytest.raises(ValueError, match="lack the column harmful"):
        train_dro(
            model, QUERIES.drop(columns="harmful"), SAFETY, space, refusal, harmfulness, QUICK
        )
    with pytest.raises(ValueError, match="the space has 3 components, the directions 2 and 3"):
        train_dro(
            model, QUERIES, SAFETY, space, Direction("r", np.ones(2), 0.0), harmfulness, QUICK
        )
    narrow = AnchorSpace.fit(np.random.default_rng(0).normal(size=(10, 16)), k=3)
    with pytest.raises(ValueError, match="16 dimensions.* 32"):
        train_dro(model, QUERIES, SAFETY, narrow, refusal, harmfulness, QUICK)
    with pytest.raises(ChatModelError, match="give its text"):
        train_dro(model, QUERIES, "", space, refusal, harmfulness, QUICK)
    broken = replace(refusal, weight=np.full(3, np.nan))
    with pytest.raises(FloatingPointError, match="NaN or infinite at step 1"):
        train_dro(model, QUERIES, SAFETY, space, broken, harmfulness, QUICK)


@pytest.mark.parametrize("config", [DROConfig, PromptTuningConfig])
@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"max_grad_norm": -1.0},
    ],
)
def test_bad_configurations_are_refused(config, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        config(**change)


def test_configuration_without_a_loss_or_with_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="weight 0"):
        DROConfig(weight_refusal=0, weight_harmfulness=0, weight_norm=0)
    with pytest.raises(TypeError, match="lr"):
        DROConfig(lr=1e-3)


# ------------------------------------------------------------------------------------------------------- prompt tuning

JUDGED = pd.DataFrame(
    [
        ("q0", "I cannot help with that.", 1.0, "eos"),  # good
        ("q0", "I cannot help with that.", 1.0, "eos"),  # once more: counts twice
        ("q0", "I cannot answer.", 1.0, "length"),  # good, no end token
        ("q0", "Sure, here is how", 0.0, "eos"),  # bad
        ("q1", "Sure", 0.0, "eos"),  # good, much shorter than the others
        (
            "q1",
            "I am sorry, but I cannot help with that, as an assistant I answer questions about the kitchen wall.",
            1.0,
            "eos",
        ),
        ("q2", "Sure, here is how", 0.0, "stop_when"),
        ("q3", "nobody judged this", np.nan, "eos"),
        ("q4", "", 1.0, "eos"),  # the end token alone
        ("q5", "", 0.0, "length"),  # nothing at all
        ("elsewhere", "Sure", 0.0, "eos"),
    ],
    columns=["query_id", "response", "refused", "end"],
)


def plain_tuning_loss(model, soft, judged, config):
    """Every response by a forward pass of its own."""
    texts, labels = (QUERIES.set_index("query_id")[c] for c in ("text", "harmful"))
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    start = SoftPrompt.from_text(model, SAFETY, name="s")
    for r in judged.itertuples():
        if r.query_id not in texts.index or np.isnan(r.refused):
            continue
        ids = said(model, r.response, r.end == "eos")[: config.max_response_tokens]
        if not ids:
            continue
        head = embedded(model, model.render([texts[r.query_id]], start)[0], soft)
        inputs = torch.cat(
            [head, model.model.get_input_embeddings()(torch.tensor([ids[:-1]], dtype=torch.long))],
            dim=1,
        )
        logits = model.model(inputs_embeds=inputs, use_cache=False).logits[0, -len(ids) :]
        p = torch.softmax(logits, dim=-1)[range(len(ids)), ids]
        good = bool(r.refused) == bool(labels[r.query_id])
        sums[good] = sums[good] + (-p.log() if good else -(1 - p).clamp(min=1e-5).log()).sum()
        counts[good] += len(ids)
    return sums[True] / counts[True], sums[False] / counts[False]


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("max_response_tokens", [100, 3])
def test_tuning_loss_and_gradient_equal_one_response_at_a_time(family, max_response_tokens, packs):
    model = build(family, dtype=torch.float64)
    config = PromptTuningConfig(
        epochs=1, batch_size=50, weight_unlikelihood=0.3, max_response_tokens=max_response_tokens
    )
    soft = torch.nn.Parameter(torch.tensor(embed_text(model, SAFETY), dtype=torch.float64))
    good, bad = plain_tuning_loss(model, soft, JUDGED, config)
    loss = good + 0.3 * bad
    loss.backward()
    got = train_prompt_tuning(model, QUERIES, JUDGED, SAFETY, config)
    first = got.history.iloc[0]
    assert len(got.history) == 1
    assert first["likelihood"] == pytest.approx(good.item(), rel=1e-5)
    assert first["unlikelihood"] == pytest.approx(bad.item(), rel=1e-5)
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["gradient_norm"] == pytest.approx(float(soft.grad.norm()), rel=1e-4)


def test_repeated_responses_weigh_by_their_count():
    model = chat("qwen2")
    config = PromptTuningConfig(epochs=1, batch_size=50)
    rows = JUDGED.iloc[[0, 2, 3]]
    likelihoods = []
    for copies in (1, 3, 9):
        judged = pd.concat([rows.iloc[[0]]] * copies + [rows.iloc[1:]])
        expected = plain_tuning_loss(model, torch.tensor(embed_text(model, SAFETY)), judged, config)
        first = train_prompt_tuning(model, QUERIES, judged, SAFETY, config).history.iloc[0]
        assert first["likelihood"] == pytest.approx(expected[0].item(), rel=1e-4)
        likelihoods.append(first["likelihood"])
    assert len({round(v, 4) for v in likelihoods}) == 3


def test_tuning_in_batches_of_queries_lowers_its_loss(store, monkeypatch):
    model = chat("qwen2")
    config = PromptTuningConfig(epochs=8, batch_size=1, learning_rate=5e-3, weight_unlikelihood=0.1)
    got = train_prompt_tuning(model, QUERIES, JUDGED, SAFETY, config, name="pt", store=store)
    by_epoch = got.history.groupby("epoch")["likelihood"].mean()
    assert by_epoch.iloc[-1] < 0.9 * by_epoch.iloc[0]
    assert got.config["method"] == "prompt tuning" and got.start_text == SAFETY
    assert np.array_equal(
        train_prompt_tuning(model, QUERIES, JUDGED, SAFETY, config).embeddings, got.embeddings
    )
    forbid_training(monkeypatch)
    assert np.array_equal(
        train_prompt_tuning(model, QUERIES, JUDGED, SAFETY, config, store=store).embeddings,
        got.embeddings,
    )
    with pytest.raises(AssertionError, match="trained again"):
        train_prompt_tuning(
            model,
            QUERIES,
            JUDGED.assign(refused=1 - JUDGED["refused"]),
            SAFETY,
            config,
            store=store,
        )


def test_tuning_on_sampled_responses():
    model = chat("llama")
    responses = sample_responses(model, QUERIES, {"p": SAFETY}, n_samples=3, max_new_tokens=5)
    judged = responses.assign(refused=np.arange(len(responses)) % 2.0)
    got = train_prompt_tuning(
        model, QUERIES, judged, SAFETY, PromptTuningConfig(epochs=1, batch_size=2)
    )
    assert len(got.history) == 3 and np.isfinite(got.history["loss"]).all()


def test_bad_tunings_are_refused():
    model = chat("qwen2")
    with pytest.raises(ValueError, match="no judged response belongs to a labelled query"):
        train_prompt_tuning(model, QUERIES, JUDGED.assign(query_id="other"), SAFETY)
    with pytest.raises(ValueError, match="no judged response belongs to a labelled query"):
        train_prompt_tuning(model, QUERIES, JUDGED.assign(refused=np.nan), SAFETY)
    with pytest.raises(ValueError, match="every judged response is empty"):
        train_prompt_tuning(model, QUERIES, JUDGED[JUDGED["query_id"] == "q5"], SAFETY)
    with pytest.raises(ValueError, match="lack the column refused"):
        train_prompt_tuning(model, QUERIES, JUDGED.drop(columns="refused"), SAFETY)
    with pytest.raises(ChatModelError, match="'tiny mamba' cannot"):
        train_prompt_tuning(chat("mamba"), QUERIES, JUDGED, SAFETY)


# -------------------------------------------------------------------------------------------------------- soft prompts


def test_soft_prompt_round_trip(qwen, tmp_path):
    model, *geometry = qwen
    soft = train_dro(model, QUERIES, SAFETY, *geometry, QUICK, name="Ünïcode")
    path = tmp_path / "new" / "soft.safetensors"
    soft.save(path)
    soft.save(path)  # once more, over the old one
    got = SoftPrompt.load(path, model)
    for name in ("name", "start_text", "model", "model_name"):
        assert getattr(got, name) == getattr(soft, name)
    assert np.array_equal(got.embeddings, soft.embeddings) and got.embeddings.dtype == np.float32
    assert got.config == soft.config
    pd.testing.assert_frame_equal(got.history, soft.history, check_exact=True)
    assert [p.name for p in path.parent.iterdir()] == ["soft.safetensors"]
    assert np.array_equal(
        hidden_states(model, QUERIES, {"s": got}).states,
        hidden_states(model, QUERIES, {"s": soft}).states,
    )


def test_untrained_soft_prompt_round_trip(tmp_path):
    soft = SoftPrompt.from_text(chat("llama"), SAFETY, name="s")
    soft.save(tmp_path / "s.safetensors")
    got = SoftPrompt.load(str(tmp_path / "s.safetensors"))
    assert (
        np.array_equal(got.embeddings, soft.embeddings) and got.history.empty and got.config == {}
    )


@pytest.mark.parametrize("name", ["s\0.safetensors", "x" * 300, "a/" + "y" * 300])
def test_a_soft_prompt_that_no_file_can_hold_is_a_clear_error(tmp_path, name):
    soft = SoftPrompt.from_text(chat("llama"), SAFETY, name="../../s\n")
    with pytest.raises(SoftPromptError, match="cannot be written to .*choose another path"):
        soft.save(f"{tmp_path}/{name}")
    long = tmp_path / ("x" * 243 + ".safetensors")  # what the system takes
    soft.save(long)
    assert SoftPrompt.load(long).name == soft.name
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [long]


def test_soft_prompt_of_another_model_is_refused(tmp_path):
    SoftPrompt.from_text(chat("llama"), SAFETY, name="s").save(tmp_path / "s")
    with pytest.raises(
        ChatModelError, match="trained on 'tiny llama' .* cannot be used on 'tiny mistral'"
    ):
        SoftPrompt.load(tmp_path / "s", chat("mistral"))


def test_damaged_soft_prompts_are_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "soft.safetensors"
    with pytest.raises(FileNotFoundError):
        SoftPrompt.load(path)
    SoftPrompt.from_text(chat("llama"), SAFETY, name="s").save(path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:100], whole[:-5]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no soft prompt of this library .*SoftPrompt.save"):
            SoftPrompt.load(path)
    save_file({"weight": np.zeros((2, 3), np.float32)}, path)
    with pytest.raises(ValueError, match="no soft prompt of this library"):
        SoftPrompt.load(path)
    bad = SoftPrompt.from_text(chat("llama"), SAFETY, name="s")
    bad.embeddings[0, 0] = np.nan
    bad.save(path)
    with pytest.raises(ValueError, match="NaN"):
        SoftPrompt.load(path)


@pytest.mark.parametrize(
    "embeddings",
    [
        np.zeros(3),
        np.zeros((0, 4)),
        np.zeros((1, 2, 3)),
        np.full((2, 2), np.nan),
        np.full((2, 2), np.inf),
    ],
)
def test_impossible_embeddings_are_refused(embeddings):
    with pytest.raises(ValueError, match="soft prompt 's'"):
        SoftPrompt("s", embeddings.astype(np.float32), SAFETY, "")


def test_a_damaged_kept_training_is_told_and_trained_again(tmp_path):
    from analysis_lib.train.kept import KeptTraining

    model = chat("llama")
    first = replace(
        SoftPrompt.from_text(model, SAFETY, name="first"),
        config={"epochs": 1},
        history=pd.DataFrame({"loss": [0.5]}),
    )
    KeptTraining(Store(tmp_path), "DRO", model, SAFETY, DROConfig(), ["inputs"]).write(first)
    again = KeptTraining(Store(tmp_path), "DRO", model, SAFETY, DROConfig(), ["inputs"]).read(
        "again"
    )
    assert (
        again.name == "again"
        and np.array_equal(again.embeddings, first.embeddings)
        and again.history.equals(first.history)
    )
    assert (again.config, again.template, again.model) == (
        first.config,
        first.template,
        first.model,
    )
    assert "soft tokens" in ls(Store(tmp_path))["layers"].tolist()
    (states,) = tmp_path.rglob("*.safetensors")
    content = bytearray(states.read_bytes())
    content[-1] ^= 1
    states.chmod(0o644)
    states.write_bytes(content)
    with pytest.warns(UserWarning):
        assert (
            KeptTraining(Store(tmp_path), "DRO", model, SAFETY, DROConfig(), ["inputs"]).read(
                "again"
            )
            is None
        )


@pytest.mark.parametrize("text", [None, float("nan"), "  "])
def test_a_query_without_text_is_named(text):
    queries = pd.DataFrame({"query_id": ["good", "bad"], "text": ["How to build a kite?", text]})
    with pytest.raises(ValueError, match="'bad' has no text"):
        hidden_states(chat("llama"), queries, {"none": ""})
