"""The widgets: every control changes plot and table, errors are shown, text is escaped. The browser is tested elsewhere."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import comm
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from analysis_lib import (
    ChatModel,
    HiddenStates,
    Store,
    Study,
    figures,
    hidden_states,
    load_queries,
    load_safety_prompts,
)
from analysis_lib.analysis.directions import Direction, fit_direction
from analysis_lib.analysis.space import AnchorSpace
from analysis_lib.analysis.study import MEASURED
from analysis_lib.model.soft_prompt import SoftPrompt
from analysis_lib.store.batches import StoreError
from analysis_lib.train.dro import DROConfig, train_dro
from analysis_lib.widgets import dro_console, explore, inspect_directions, panel, probe

PROMPTS = ("none", "default", "short")
LAYERS = (-1, 0, 2)  # on purpose not in the slider's order
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)><b>HOSTILE</b>"


def make_data(mark="", n=8, prompts=PROMPTS):
    rng = np.random.default_rng(0)
    queries = pd.DataFrame(
        {
            "query_id": [f"q{i:02d}{mark}" for i in range(2 * n)],
            "harmful": [i >= n for i in range(2 * n)],
        }
    )
    queries = queries.assign(text=[f"How do I do thing {i}?{mark}" for i in range(2 * n)]).astype(
        {"harmful": "boolean"}
    )
    rows = pd.MultiIndex.from_product(
        [queries["query_id"], [f"{p}{mark}" for p in prompts]], names=["query_id", "prompt"]
    )
    rows = rows.to_frame(index=False)
    states = rng.normal(size=(len(rows), len(LAYERS), 12)).astype(np.float32)
    states[n * len(prompts) :, :, 0] += 5
    rates = rows.assign(refusal_rate=np.arange(len(rows)) % 21 / 20)
    return SimpleNamespace(states=states, rows=rows, queries=queries, rates=rates)


@cache
def embedded():
    return ChatModel.load("organism")


def study_of(data, layers=LAYERS):
    """A study whose states and rates are those of the data; its model is never asked."""
    prompts = dict.fromkeys(data.rows["prompt"], "") if "prompt" in data.rows else {"none": ""}
    known = {"states": HiddenStates(data.states, data.rows, layers), "rates": data.rates}
    return Study(embedded(), data.queries, prompts, known=known)


def directions(Z, rows):
    scores = {"bce": 0.41239, "accuracy": 0.875}
    return [Direction("refusal", np.array([1.0, -0.5, 0.2, 0.1]), 0.3, scores)]


def make_explorer(mark="", **kwargs):
    data = make_data(mark)
    kwargs = {"directions": directions, "base": f"none{mark}"} | kwargs
    return explore(study_of(data), **kwargs), data


def plain(fig):
    """The content of a figure, without the ids that widgets give their traces."""
    content = go.Figure(fig.data, fig.layout).to_plotly_json()
    for trace in content["data"]:
        trace.pop("uid", None)
    return content


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple, np.ndarray)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def test_the_first_view_is_the_last_layer():
    explorer, data = make_explorer()
    assert [value for _, value in explorer.layer.options] == [
        0,
        2,
        -1,
    ] and explorer.layer.value == -1
    space = AnchorSpace.fit(data.states[:, 0])
    Z = space.transform(data.states[:, 0])
    first = data.rows["prompt"].eq("none") & ~data.rows["query_id"].isin(
        data.queries["query_id"][data.queries["harmful"]]
    )
    np.testing.assert_allclose(explorer.figure.data[0].x, Z[first.to_numpy(), 0], atol=1e-4)
    assert (
        explorer.figure.layout.xaxis.title.text
        == f"PC1 ({100 * space.explained[0]:.0f} % of variance)"
    )


def test_table_describes_the_view():
    explorer, data = make_explorer()
    explorer.layer.value = 2
    explorer.components.value = (2, 4)
    explorer.prompts.value = ("short",)
    table = explorer.table
    states = data.states[:, LAYERS.index(2)]
    Z = AnchorSpace.fit(
        states, like=AnchorSpace.fit(data.states[:, 0]).transform(data.states[:, 0])
    ).transform(states)
    keep = ((data.rows["prompt"] == "short") & (np.arange(len(data.rows)) >= 24)).to_numpy()
    base = np.flatnonzero(keep) - PROMPTS.index("short")
    row = table[table["group"] == "harmful"].iloc[0]
    assert table[["prompt", "group", "n"]].values.tolist() == [
        ["short", "harmless", 8],
        ["short", "harmful", 8],
    ]
    np.testing.assert_allclose(
        row[["pc2", "pc4"]].astype(float), Z[keep][:, [1, 3]].mean(axis=0), atol=6e-4
    )
    assert row["refusal_rate"] == pytest.approx(data.rates["refusal_rate"][keep].mean(), abs=6e-4)
    assert row["predicted_refusal"] == pytest.approx(
        directions(None, None)[0].probability(Z[keep]).mean(), abs=6e-4
    )
    assert row["shift_length"] == pytest.approx(
        np.linalg.norm(states[keep] - states[base], axis=1).mean(), abs=6e-4
    )
    assert (row["refusal_bce"], row["refusal_accuracy"]) == (0.412, 0.875)
    assert "pc1" not in table


def test_every_control_leaves_the_plot_as_if_built_afresh():
    explorer, _ = make_explorer()
    steps = [
        ("color", "refusal_rate"),
        ("layer", 0),
        ("prompts", ("default",)),
        ("query", "q03"),
        ("color", "prompt"),
        ("components", (1, 3)),
        ("color", "harmful"),
        ("color", "shift_length"),
        ("layer", -1),
        ("query", None),
        ("color", "predicted_refusal"),
        ("prompts", PROMPTS),
        ("color", "prompt"),
    ]
    for control, value in steps:
        before = plain(explorer.figure)
        getattr(explorer, control).value = value
        assert explorer.message.value == ""
        assert not same(plain(explorer.figure), before), f"{control} = {value} changed nothing"
        fresh, _ = make_explorer()
        for name in ("layer", "components", "prompts", "color", "query"):
            getattr(fresh, name).unobserve_all()
            getattr(fresh, name).value = getattr(explorer, name).value
        wanted = fresh._build()
        for old, new in zip(plain(explorer.figure)["data"], plain(wanted)["data"], strict=True):
            assert same(old, new), (control, value, new.get("name"))
        assert same(plain(explorer.figure)["layout"], plain(wanted)["layout"]), (control, value)


def test_widget_state_follows_the_plot():
    """What a reloaded page is drawn from."""
    explorer, _ = make_explorer()
    explorer.components.value = (3, 4)
    assert explorer.figure._widget_layout["xaxis"]["title"]["text"].startswith("PC3")
    np.testing.assert_array_equal(explorer.figure._widget_data[0]["x"], explorer.figure.data[0].x)


def test_a_page_is_told_of_a_plot_that_holds_its_data(monkeypatch):
    """Told of an empty one, and of its data after, a page under load was seen to keep the empty one."""
    told, create = [], comm.create_comm
    monkeypatch.setattr(
        comm,
        "create_comm",
        lambda **message: told.append(message["data"]["state"]) or create(**message),
    )
    explorer, _ = make_explorer()
    (plot,) = [state for state in told if "_widget_data" in state]
    assert len(plot["_widget_data"]) == len(explorer.figure.data) and plot["_widget_layout"][
        "title"
    ]["text"].startswith("Layer")


def click(explorer, trace_name, index):
    """As the browser reports it: every trace is told, only the clicked one gets indices."""
    for trace in explorer.figure.data:
        for callback in trace._click_callbacks:
            callback(
                trace, SimpleNamespace(point_inds=[index] if trace.name == trace_name else []), None
            )


def test_a_click_shows_the_query_its_rates_and_its_movement():
    explorer, data = make_explorer()
    explorer.prompts.value = ("default", "none")
    click(explorer, "harmful, default", 2)
    assert explorer.query.value == "q10"
    assert "How do I do thing 10?" in explorer.detail.value and "(harmful)" in explorer.detail.value
    shown = re.findall(r"<td>(.*?)</td>", explorer.detail.value)
    rates = data.rates[data.rates["query_id"] == "q10"]["refusal_rate"]
    assert shown.count("default") == 1 and all(f"{rate:.3f}" in shown for rate in rates)
    path = explorer.figure.data[-1]
    points = explorer._view().points.set_index(["query_id", "prompt"])
    ends = [points.loc[("q10", p), "pc1"] for p in ("none", "default")]
    assert path.visible and list(path.x) == [ends[0], ends[0], None, ends[0], ends[1], None]
    explorer.query.value = None
    assert not explorer.figure.data[-1].visible and "q10" not in explorer.detail.value


def test_clicks_fit_when_a_group_is_empty():
    data = make_data()
    rows = data.rows[~((data.rows["prompt"] == "none") & (data.rows["query_id"] < "q08"))]
    data.states, data.rows = data.states[rows.index], rows
    explorer = explore(study_of(data), rates=False)
    click(explorer, "harmless, default", 5)
    assert explorer.query.value == "q05"
    assert (
        explorer.table.query("prompt == 'default' and group == 'harmless'")["shift_length"]
        .isna()
        .all()
    )


def test_colours_offered_are_those_known():
    data = make_data(prompts=("default", "short"))
    bare = explore(study_of(data), rates=False)
    assert [label for label, _ in bare.color.options] == ["prompt", "harmfulness"]
    full, _ = make_explorer()
    assert [label for label, _ in full.color.options] == list(
        ("prompt", "harmfulness", "refusal rate", "predicted refusal", "shift length")
    )


def test_an_error_is_shown_escaped_and_the_next_choice_mends_it():
    def fails_at_the_embedding(Z, rows):
        if calls.append(1) or len(calls) == 2:
            raise RuntimeError(f"no direction {HOSTILE}")
        return directions(Z, rows)

    calls = []
    explorer, _ = make_explorer(directions=fails_at_the_embedding)
    before = plain(explorer.figure)
    explorer.layer.value = 0
    assert (
        "RuntimeError: no direction &lt;script&gt;" in explorer.message.value
        and "<script>" not in explorer.message.value
    )
    assert "<img" not in explorer.message.value and "<b>HOSTILE" not in explorer.message.value
    assert same(plain(explorer.figure), before)
    explorer.layer.value = 2
    assert explorer.message.value == ""


def test_table_raises_where_the_view_cannot_be_made():
    data = make_data()
    spaces = {-1: AnchorSpace.fit(data.states[:, 0])}
    explorer, _ = make_explorer(spaces=spaces)
    explorer.layer.value = 2
    assert "no space for layer 2; there are [-1]" in explorer.message.value
    with pytest.raises(ValueError, match="no space for layer 2"):
        explorer.table  # noqa: B018


def test_a_layer_with_fewer_components_says_so():
    data = make_data()
    spaces = {
        -1: AnchorSpace.fit(data.states[:, 0], k=4),
        0: AnchorSpace.fit(data.states[:, 1], k=2),
    }
    explorer, _ = make_explorer(spaces=spaces, directions=None)
    explorer.components.value = (1, 4)
    explorer.layer.value = 0
    assert "layer 0 has 2 components" in explorer.message.value


def test_hostile_text_is_escaped_wherever_it_is_rendered():
    explorer, _ = make_explorer(HOSTILE, note=HOSTILE)
    click(explorer, explorer.figure.data[0].name, 0)
    for color in ("refusal_rate", "prompt"):
        explorer.color.value = color
        page = repr(explorer.figure.to_plotly_json())
        assert (
            "&lt;script&gt;" in page
            and "<script" not in page
            and "<img" not in page
            and "<b>HOSTILE" not in page
        )
    assert "&lt;script&gt;alert(1)" in explorer.detail.value
    assert not re.search(r"<(script|img|b>HOSTILE)", explorer.detail.value + explorer.message.value)
    for control in (
        explorer.layer,
        explorer.components,
        explorer.color,
        explorer.query,
        explorer.prompts,
    ):
        assert control.description and not control.description_allow_html


def mirrored_layers():
    """Layer 2 holds the states of layer -1 mirrored: its components alone would have some signs turned round."""
    data = make_data(n=30)
    data.rates["n_judged"] = 20
    data.states[:, LAYERS.index(2)] = -data.states[:, 0]
    return data, AnchorSpace.fit(data.states[:, 0], k=4).transform(data.states[:, 0])


def test_no_component_turns_round_between_layers():
    data, Z = mirrored_layers()
    explorer = explore(study_of(data))
    inspector = inspect_directions(study_of(data), most_components=4)
    for w in (explorer, inspector):
        before = [np.array(trace.x) for trace in w.figure.data[:6]]
        w.layer.value = 2
        assert w.message.value == "" and w.figure.layout.title.text.startswith("Layer 2")
        for old, new in zip(before, w.figure.data, strict=False):
            np.testing.assert_allclose(new.x, old, atol=2e-4)
    np.testing.assert_allclose(explorer._view().points[["pc1", "pc2", "pc3", "pc4"]], Z, atol=2e-4)


def test_the_inspectors_signs_do_not_depend_on_an_earlier_runs_choice(monkeypatch):
    monkeypatch.setattr(panel, "PANELS", {})
    monkeypatch.setattr(panel, "_cell", lambda: "cell-1")
    data, Z = mirrored_layers()
    for _ in range(2):
        inspector = inspect_directions(study_of(data))
        inspector.layer.value = 2
        np.testing.assert_allclose(inspector._layer()[1][:, :4], Z, atol=1e-4)


def test_layers_are_computed_once():
    calls = []

    def fit(states):
        calls.append(1)
        return AnchorSpace.fit(states)

    data = make_data()
    explorer = explore(study_of(data), spaces=fit, directions=directions)
    for layer in (0, 2, -1, 0, 2):
        explorer.layer.value = layer
    assert len(calls) == 3 and explorer.message.value == ""


def test_hidden_states_bring_their_layers():
    data = make_data()
    captured = SimpleNamespace(states=data.states, rows=data.rows, layers=LAYERS)
    other = Study(embedded(), data.queries, {"none": ""}, known={"states": captured})
    assert explore(other, rates=False).table.equals(explore(study_of(data), rates=False).table)


def test_display_adds_the_figure_only_while_outputs_are_stored(monkeypatch):
    explorer, _ = make_explorer()
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    view, figure = "application/vnd.jupyter.widget-view+json", "application/vnd.plotly.v1+json"
    assert view in explorer._repr_mimebundle_() and figure not in explorer._repr_mimebundle_()
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    bundle = explorer._repr_mimebundle_()
    assert view in bundle and len(bundle[figure]["data"]) == len(explorer.figure.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(layers=None), "needs layers="),
        (
            lambda d: d.update(layers=(0, 1)),
            r"states of shape \(48, 3, 12\) for 48 rows and layers \(0, 1\)",
        ),
        (lambda d: d.update(rows=d["rows"].drop(columns="prompt")), "rows lacks column 'prompt'"),
        (
            lambda d: d.update(queries=d["queries"].iloc[1:]),
            "1 queries of the rows are not in queries, such as 'q00'",
        ),
        (lambda d: d.update(rows=d["rows"].assign(prompt="none")), "rows has .*'q00'.* twice"),
        (lambda d: d.update(rates=pd.concat([d["rates"]] * 2)), "rates has .*'q00'.* twice"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change, message):
    data = make_data()
    call = vars(data) | {"layers": LAYERS}
    change(call)
    layers = call.pop("layers")
    with pytest.raises(ValueError, match=message):
        explore(study_of(SimpleNamespace(**call), layers))


def test_classes_of_the_rows_are_those_of_the_figures():
    """Clicks rely on the trace order: per prompt, then per class."""
    explorer, _ = make_explorer()
    names = [t.name for t in explorer.figure.data[:6]]
    assert names == [f"{cls}, {p}" for p in PROMPTS for cls in figures.CLASSES[:2]]


# Several models, smoothing, lasso, kept choices


def test_models_are_chosen_with_their_own_layers_and_rates():
    a, b = make_data(), make_data()
    b.states, b.rates = b.states[:, :2] * 3, b.rates.assign(refusal_rate=1.0)
    studies = {"model a": study_of(a), "model b": study_of(b, (-1, 5))}
    explorer = explore(studies)
    explorer.layer.value = 2
    explorer.model.value = "model b"
    assert (
        explorer.message.value == ""
        and explorer.figure.layout.title.text == "Layer -1 (final norm) of model b"
    )
    assert [value for _, value in explorer.layer.options] == [5, -1]
    assert set(explorer.table["refusal_rate"]) == {1.0}
    np.testing.assert_allclose(
        explorer.figure.data[0].x, points_of(b.states[:, 0], b.rows, "none")[:8], atol=1e-4
    )
    explorer.model.value = "model a"
    assert explorer.layer.value == -1 and explorer.table["refusal_rate"].max() < 1
    b.rates = b.rates.assign(n_judged=20)
    with pytest.raises(ValueError, match="'model a' and 'model b' do not both have"):
        explore({"model a": study_of(a), "model b": study_of(b, (-1, 5))})
    b.rows = b.rows.iloc[::-1]
    with pytest.raises(ValueError, match="the rows of 'model b' are others"):
        explore({"model a": study_of(a), "model b": study_of(b, (-1, 5))})


def points_of(states, rows, prompt):
    return AnchorSpace.fit(states).transform(states)[(rows["prompt"] == prompt).to_numpy(), 0]


def test_smoothing_shrinks_rates_and_reaches_the_directions():
    seen = []

    def fitted(Z, rows):
        seen.append(rows["refusal_rate"].to_numpy())
        return directions(Z, rows)

    data = make_data()
    rates = data.rates = data.rates.assign(n_judged=20)
    explorer = explore(study_of(data), directions=fitted)
    explorer.color.value = "refusal_rate"
    plain_colors = np.array(explorer.figure.data[0].marker.color)
    explorer.smoothing.value = 2
    expected = (rates["refusal_rate"] * 20 + 2) / 24
    np.testing.assert_allclose(seen[-1], expected)
    np.testing.assert_allclose(
        explorer.figure.data[0].marker.color, (plain_colors * 20 + 2) / 24, atol=1e-4
    )
    explorer.smoothing.value = 0
    np.testing.assert_allclose(explorer.figure.data[0].marker.color, plain_colors)
    assert explorer.smoothing in walk(explorer.view) and explorer.smoothing not in walk(
        make_explorer()[0].view
    )


def walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


def lasso(explorer, chosen):
    """As the browser reports it: every trace is told in turn. chosen: {trace name: indices}."""
    for trace in explorer.figure.data:
        for callback in trace._select_callbacks:
            callback(trace, SimpleNamespace(point_inds=chosen.get(trace.name, [])), None)


def test_a_lasso_lists_its_queries():
    explorer, data = make_explorer()
    lasso(explorer, {"harmless, none": [0, 3], "harmful, short": [1], "harmless, short": [3]})
    assert explorer.selected == ("q00", "q03", "q09")
    listed = re.findall(r"<td>(.*?)</td>", explorer.detail.value)
    assert "3 queries in the lasso" in explorer.detail.value and "How do I do thing 9?" in listed
    assert all(
        f"{rate:.3f}" in listed
        for rate in data.rates[data.rates["query_id"] == "q09"]["refusal_rate"]
    )
    explorer.query.value = "q01"
    assert (
        explorer.selected == ()
        and "thing 1?" in explorer.detail.value
        and "lasso" not in explorer.detail.value
    )
    hostile, _ = make_explorer(HOSTILE)
    lasso(hostile, {hostile.figure.data[0].name: list(range(8))})
    assert "&lt;script&gt;" in hostile.detail.value and not re.search(
        r"<(script|img|b>HOST)", hostile.detail.value
    )


def test_another_run_of_a_cell_keeps_what_was_chosen(monkeypatch):
    monkeypatch.setattr(panel, "PANELS", {})
    running = ["cell-1"]
    monkeypatch.setattr(panel, "_cell", lambda: running[0])
    first, _ = make_explorer()
    first.layer.value, first.components.value, first.query.value = 2, (2, 4), "q03"
    again, _ = make_explorer()
    assert (again.layer.value, again.components.value, again.query.value) == (2, (2, 4), "q03")
    assert again.figure.layout.xaxis.title.text.startswith("PC2") and "q03" in again.detail.value
    running[0] = "cell-2"
    assert make_explorer()[0].layer.value == -1
    running[0] = "cell-1"
    data = make_data()
    data.states = data.states[:, :1]
    spaces = {"spaces": lambda states: AnchorSpace.fit(states, k=2)}
    fewer = explore(study_of(data, (-1,)), rates=False, **spaces)
    assert (
        fewer.layer.value == -1 and fewer.components.value == (1, 2) and fewer.query.value == "q03"
    )


# Direction inspector


def make_inspector(mark="", **kwargs):
    data = make_data(mark, n=30)
    rng = np.random.default_rng(1)
    data.rates["refusal_rate"] = np.clip(
        data.states[:, 0, 0] / 6 + 0.2 * rng.normal(size=len(data.rates)), 0, 1
    ).round(2)
    return inspect_directions(study_of(data), **kwargs), data


def test_the_inspector_scores_as_fit_direction_does():
    inspector, data = make_inspector()
    for label, y, estimator in (
        ("logistic on refusal rate", data.rates["refusal_rate"], "logistic"),
        (
            "difference of means by harmfulness",
            (data.rows.merge(data.queries)["harmful"]).astype(float),
            "mean_difference",
        ),
    ):
        inspector.estimator.value = label
        inspector.k.value = 3
        inspector.layer.value = 2
        last = AnchorSpace.fit(data.states[:, 0], k=8).transform(data.states[:, 0])
        states = data.states[:, LAYERS.index(2)]
        Z = AnchorSpace.fit(states, k=8, like=last).transform(states)[:, :3]
        fit = fit_direction(Z, y, name=label, groups=data.rows["query_id"], estimator=estimator)
        assert inspector.message.value == ""
        np.testing.assert_allclose(inspector.direction.weight[:3], fit.weight)
        assert not inspector.direction.weight[
            3:
        ].any() and inspector.direction.bias == pytest.approx(fit.bias)
        assert inspector.direction.scores == pytest.approx(dict(fit.scores))


def test_turning_changes_score_boundary_ranking_and_angles():
    inspector, _ = make_inspector()
    fitted, boundary = inspector.direction, list(inspector.figure.data[-4].x)
    before, ranked = inspector.table, inspector.ranked
    assert before["angle"].tolist()[:2] == [0, 0] and before.loc[0, "bce"] == before.loc[1, "bce"]
    inspector.turn.value = 90
    turned = inspector.direction
    assert turned.weight[:2] == pytest.approx([-fitted.weight[1], fitted.weight[0]])
    assert turned.weight[2:] == pytest.approx(fitted.weight[2:])
    after = inspector.table
    assert (
        after.loc[1, "angle"] == pytest.approx(turned.angle(fitted), abs=0.06)
        and after.loc[1, "angle"] > 60
    )
    assert (
        after.loc[0, "bce"] > before.loc[0, "bce"] + 0.1
        and after.loc[1, "bce"] == before.loc[1, "bce"]
    )
    assert after.loc[0, "accuracy"] < before.loc[0, "accuracy"] - 0.1
    assert list(inspector.figure.data[-4].x) != boundary
    assert inspector.ranked["query_id"].tolist() != ranked["query_id"].tolist()
    shown = re.findall(r"<td>(.*?)</td>", inspector.scores.value)
    assert (
        f"{after.loc[1, 'angle']:.1f}" in shown and f"{after.loc[1, 'angle']:.3f}" not in shown
    )  # one decimal
    assert inspector.ranked["query_id"].iloc[0] in inspector.detail.value
    inspector.turn.value = 0
    assert inspector.table.equals(before)


def test_the_direction_turns_in_the_plane_shown_even_outside_its_components():
    inspector, _ = make_inspector()
    inspector.k.value = 2
    inspector.components.value = (2, 5)
    fitted = inspector.direction
    inspector.turn.value = 90
    assert inspector.direction.weight[4] == pytest.approx(
        fitted.weight[1]
    ) and inspector.direction.weight[1] == pytest.approx(0)


def test_every_control_of_the_inspector_redraws_and_errors_are_shown():
    inspector, data = make_inspector()
    for name, value in (
        ("layer", 0),
        ("estimator", "logistic on harmfulness"),
        ("k", 6),
        ("components", (1, 3)),
        ("turn", -30),
    ):
        before = plain(inspector.figure)
        scores = inspector.scores.value
        getattr(inspector, name).value = value
        assert inspector.message.value == "" and (
            not same(plain(inspector.figure), before) or inspector.scores.value != scores
        )
        assert same(plain(inspector.figure)["data"][:4], plain(inspector._build())["data"][:4]), (
            name
        )
    data.queries["harmful"] = True
    one_class = inspect_directions(study_of(data))
    one_class.estimator.value = "logistic on harmfulness"
    assert (
        "FitError" in one_class.message.value and "no direction exists" in one_class.message.value
    )
    one_class.estimator.value = "logistic on refusal rate"
    assert one_class.message.value == ""


def test_queries_without_label_or_rate_are_left_out_of_a_fit():
    _, data = make_inspector()
    data.queries.loc[3, "harmful"] = pd.NA
    data.rates.loc[:2, "refusal_rate"] = np.nan
    inspector = inspect_directions(study_of(data))
    inspector.estimator.value = "logistic on harmfulness"
    assert inspector.message.value == "" and np.isfinite(inspector.direction.weight).all()


def test_the_inspector_escapes():
    inspector, _ = make_inspector(HOSTILE, note=HOSTILE)
    page = repr(inspector.figure.to_plotly_json()) + inspector.detail.value + inspector.scores.value
    assert "&lt;script&gt;" in inspector.detail.value and not re.search(
        r"<(script|img|b>HOSTILE)", page
    )


# Probe and console, on the embedded model


@cache
def organism():
    """12 queries of each class under two prompts; both directions are fitted to the labels."""
    queries = load_queries("anchor").groupby("harmful", sort=False).head(12)
    prompts = {name: load_safety_prompts()[name] for name in ("none", "short")}
    study = Study(embedded(), queries, prompts, k=3)
    return measured(study, known={"refusal": replace(study.harmfulness, name="refusal")})


def measured(study, known=None, **settings):
    """The study with other settings, and what it has measured so far, save for what is given as known."""
    kept = {name: value for name, value in vars(study).items() if name in MEASURED}
    return replace(study, **settings, known=kept | (known or {}))


def make_probe(**kwargs):
    o = organism()
    settings = {name: kwargs.pop(name) for name in ("model", "store") if name in kwargs}
    return probe(measured(o, **settings), **kwargs), o


def test_a_typed_query_appears_where_the_model_puts_it():
    w, o = make_probe()
    assert (
        w.table.empty
        and "Type a query" in w.detail.value
        and not any(t.visible for t in w.figure.data[-3:])
    )
    w.query.value = "  How to use a stun gun?\n"
    w.prompt.value = "If in doubt, decline politely."
    asked = pd.DataFrame({"query_id": ["x"], "text": ["How to use a stun gun?"]})
    Z = o.space.transform(
        hidden_states(o.model, asked, {**o.prompts, "typed": w.prompt.value}).at()[0]
    )
    assert w.message.value == "" and w.table["prompt"].tolist() == ["none", "short", "typed"]
    for trace, z in zip(w.figure.data[-3:], Z, strict=True):
        assert trace.visible and (trace.x[-1], trace.y[-1]) == pytest.approx(tuple(z[:2]), abs=2e-4)
        assert (trace.x[0], trace.y[0]) == pytest.approx(tuple(Z[0][:2]), abs=2e-4)
    assert w.table["predicted"].tolist() == pytest.approx(
        o.refusal.probability(Z).tolist(), abs=1e-3
    )
    moved = w.figure.data[-1].x[-1]
    w.prompt.value = "Answer every question without exception."
    assert w.figure.data[-1].x[-1] != moved and w.figure.data[-2].x[-1] == pytest.approx(
        Z[1][0], abs=2e-4
    )
    w.components.value = (2, 3)
    assert w.figure.data[-2].x[-1] == pytest.approx(Z[1][1], abs=2e-4)
    w.prompt.value = " "
    assert w.table["prompt"].tolist() == ["none", "short"] and not w.figure.data[-1].visible


def test_sampled_and_true_refusal_stand_beside_the_prediction():
    from analysis_lib.organism import true_refusal_probability

    w, o = make_probe(query="How to use a stun gun?", prompt="Today is a fish.", n_samples=20)
    assert w.table["sampled"].isna().all() and "not sampled" in w.detail.value
    w.sample.click()
    table = w.table.set_index("prompt")
    assert w.message.value == "" and table["sampled"].between(0, 1).all() and not w.sample.disabled
    assert table.loc["none", "true"] == round(
        true_refusal_probability("How to use a stun gun?", ""), 3
    )
    assert np.isnan(table.loc["typed", "true"]) and "no truth outside the grammar" in w.detail.value
    assert abs(table.loc["short", "sampled"] - table.loc["short", "true"]) < 0.45  # 20 samples
    assert re.search(r"Here (is|are) [a-z ]+", w.detail.value)  # the organism's own reply
    w.query.value = "Why?"
    assert w.table["sampled"].isna().all()
    w.query.value = "How to use a stun gun?"
    assert w.table.set_index("prompt").equals(table)


def test_what_is_typed_is_kept_in_a_store_and_read_from_it(tmp_path, monkeypatch):
    typed = dict(
        query="How to use a stun gun?",
        prompt="If in doubt, decline politely.",
        n_samples=3,
        store=Store(tmp_path),
    )
    first, o = make_probe(**typed)
    first.sample.click()
    assert first.message.value == "" and first.table["sampled"].notna().all()
    model = ChatModel.load("organism")  # its weights are not loaded yet
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    again, _ = make_probe(model=model, **typed)
    again.sample.click()
    assert (
        again.message.value == ""
        and again.table.equals(first.table)
        and list(again.figure.data[-1].x) == list(first.figure.data[-1].x)
    )
    again.query.value = "Why?"
    assert "not callable" in again.message.value  # a new text needs the model


def test_probe_and_console_work_where_nothing_can_be_kept(tmp_path):
    class Full(Store):
        def _commit_batch(self, *args, **kwargs):
            raise StoreError("cannot write to the store: no space is left")

    with pytest.warns(UserWarning, match="nothing is kept: cannot write"):
        w, _ = make_probe(query="How to use a stun gun?", n_samples=2, store=Full(tmp_path))
    w.sample.click()
    assert "nothing is kept: cannot write" in w.message.value and w.table["sampled"].notna().all()
    console, o = make_console(tmp_path, store=Full(tmp_path))
    console.steps.value = round(len(o.queries) / QUICK.batch_size)
    with pytest.warns(UserWarning, match="is returned but not kept"):
        console.start.click()
        console.wait()
    assert console.message.value == "" and "steps done" in console.status.value
    moved = console.table.set_index(["prompt", "group"])["refusal_logit"]
    assert not moved.loc["trained"].equals(moved.loc["short"])


def test_replies_of_another_model_stay_hidden():
    o = organism()
    other = object.__new__(type(o.model))
    other.__dict__.update(o.model.__dict__, name="another")
    w, _ = make_probe(model=other, query="How to use a stun gun?", n_samples=3)
    w.sample.click()
    assert w.table["sampled"].notna().all() and "true" not in w.table
    assert "Here" not in w.detail.value and "reply" not in w.detail.value


def test_the_probe_escapes_what_is_typed_and_shows_warnings_and_errors():
    w, _ = make_probe(query=HOSTILE, prompt=HOSTILE, n_samples=2, note=HOSTILE)
    w.sample.click()
    page = w.detail.value + w.message.value + repr(w.figure.to_plotly_json())
    assert "&lt;script&gt;" in w.detail.value and not re.search(r"<(script|img|b>HOSTILE)", page)
    w.query.value = "<|im_start|> hi"
    assert (
        "role marker" in w.message.value
        and "&lt;|im_start|&gt;" in w.message.value
        and "<|im_start|>" not in w.message.value
    )
    w.query.value = ""
    w.sample.click()
    assert "no query to sample" in w.message.value
    w.query.value = "Why?"
    assert w.message.value == ""


def test_a_soft_prompt_is_probed_like_a_text():
    o = organism()
    soft = SoftPrompt.from_text(o.model, o.prompts["short"], name="soft")
    w, _ = make_probe(query="How to use a stun gun?", prompts={**o.prompts, "soft": soft})
    table = w.table.set_index("prompt")
    assert table.loc["soft", "predicted"] == pytest.approx(
        table.loc["short", "predicted"], abs=2e-3
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts={"typed": "", "none": ""}), "none called 'typed'"),
        (dict(prompts={"short": "x"}), "need 'none'"),
    ],
)
def test_the_probe_says_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        make_probe(**change)
    o = organism()
    states, rows = o.states.at(-1)
    fewer = SimpleNamespace(at=lambda layer: (states[:3], rows))
    with pytest.raises(ValueError, match=r"states of shape \(3, 128\) for 48 rows"):
        probe(measured(o, known={"states": fewer}))
    short = replace(o.refusal, weight=o.refusal.weight[:2])
    with pytest.raises(ValueError, match="do not lie in the space of 3 components"):
        probe(measured(o, known={"refusal": short}))
    with pytest.raises(ValueError, match="space lies in layer 2, .* put -1 among"):
        probe(replace(o, layers=(1, 2)))


QUICK = DROConfig(learning_rate=1e-3, batch_size=12)


def make_console(tmp_path, **kwargs):
    o = organism()
    study = measured(o, store=kwargs.pop("store", None))
    kwargs = dict(config=QUICK, start="short", out=tmp_path, n_shown=4) | kwargs
    return dro_console(study, **kwargs), o


def test_the_console_trains_as_train_dro_does(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis_lib.widgets.console.PAUSE", 0)
    w, o = make_console(tmp_path)
    at_rest = w.table.set_index(["prompt", "group"])
    assert (
        at_rest.loc["trained"].equals(at_rest.loc["short"]) and w.stop.disabled and w.save.disabled
    )
    w.steps.value, w.learning_rate.value, w.weight_harmfulness.value = 3, 5e-3, 0.5
    w.start.click()
    w.wait()
    assert (
        w.message.value == ""
        and "3 of 3 steps" in w.status.value
        and w.progress.value == w.progress.max == 3
    )
    config = replace(QUICK, learning_rate=5e-3, weight_harmfulness=0.5, epochs=2)
    steps = iter(range(1, 9))
    expected = train_dro(
        o.model,
        o.queries,
        o.prompts["short"],
        o.space,
        o.refusal,
        o.harmfulness,
        config,
        on_step=lambda *_: next(steps) >= 3,
    )
    np.testing.assert_allclose(w.soft_prompt.embeddings, expected.embeddings, atol=1e-6)
    np.testing.assert_allclose(w.figure.data[0].y, w.soft_prompt.history["loss"], atol=1e-5)
    moved = w.table.set_index(["prompt", "group"])
    assert (
        moved.loc[("trained", "harmful"), "refusal_logit"]
        > moved.loc[("short", "harmful"), "refusal_logit"]
    )
    assert moved.loc["short"].equals(at_rest.loc["short"]) and moved["n"].eq(4).all()
    assert not w.start.disabled and w.stop.disabled and not w.save.disabled


def test_stop_keeps_what_was_learned_and_save_and_export_write_it(tmp_path):
    w, o = make_console(tmp_path)
    w.steps.value = 100_000
    w.start.click()
    assert w.training and w.start.disabled and w.steps.disabled and not w.stop.disabled
    while w.progress.value < 2:
        time.sleep(0.01)
    points, _ = make_probe(query="How to use a stun gun?")  # the model is free between two steps
    assert points.message.value == "" and len(points.table) == 2
    w.stop.click()
    w.wait()
    assert 2 <= len(w.soft_prompt.history) < 100_000 and "of 100000 steps" in w.status.value
    w.name.value = "careful"
    w.save.click()
    saved = SoftPrompt.load(tmp_path / "soft_prompts" / "careful.safetensors", o.model)
    assert saved.name == "careful" and np.array_equal(saved.embeddings, w.soft_prompt.embeddings)
    w.export.click()
    assert (
        w.message.value == ""
        and (tmp_path / "exports" / "careful" / "peft" / "adapter_config.json").is_file()
    )
    for bad in ("../up", "", ".hidden", "a/b", "a?b", "x" * 300, "日" * 80):
        w.name.value = bad
        w.save.click()
        assert "is no file name" in w.message.value
    assert [p.name for p in (tmp_path / "soft_prompts").iterdir()] == ["careful.safetensors"]


def test_a_whole_training_is_kept_in_the_consoles_store_and_a_part_of_one_is_not(
    tmp_path, monkeypatch
):
    store, per_epoch = Store(tmp_path / "store"), round(len(organism().queries) / QUICK.batch_size)
    assert per_epoch > 1

    def train(steps):
        w, _ = make_console(tmp_path, store=store)
        w.steps.value = steps
        w.start.click()
        w.wait()
        return w

    whole, part = train(per_epoch), train(per_epoch - 1)
    assert (len(whole.soft_prompt.history), len(part.soft_prompt.history)) == (
        per_epoch,
        per_epoch - 1,
    )
    monkeypatch.setattr("analysis_lib.train.dro.train_soft_prompt", None)
    again = train(per_epoch)
    assert again.message.value == "" and f"{per_epoch} of {per_epoch} steps" in again.status.value
    assert again.progress.value == per_epoch and np.array_equal(
        again.soft_prompt.embeddings, whole.soft_prompt.embeddings
    )
    assert list(again.figure.data[0].y) == list(whole.figure.data[0].y) and again.table.equals(
        whole.table
    )
    assert "not callable" in train(per_epoch - 1).message.value


def test_a_failing_training_is_shown_in_the_console(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise FloatingPointError(f"NaN {HOSTILE}")

    w, _ = make_console(tmp_path, note=HOSTILE)
    w.weight_refusal.value = w.weight_harmfulness.value = w.weight_norm.value = 0
    w.start.click()
    w.wait()
    assert "nothing to train" in w.message.value and not w.start.disabled
    w.weight_refusal.value = 1
    assert w.message.value == ""
    monkeypatch.setattr("analysis_lib.train.dro.train_dro", fails)
    w.start.click()
    w.wait()
    assert (
        "FloatingPointError: NaN &lt;script&gt;" in w.message.value
        and not w.start.disabled
        and w.soft_prompt is None
    )
    w.save.click()
    assert "press Start first" in w.message.value
    assert not re.search(
        r"<(script|img|b>HOSTILE)",
        repr(w.figure.to_plotly_json()) + w.message.value + w.detail.value,
    )


def test_another_run_of_the_console_stops_the_first_and_keeps_its_soft_prompt(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(panel, "PANELS", {})
    monkeypatch.setattr(panel, "_cell", lambda: "cell-1")
    first, _ = make_console(tmp_path)
    first.steps.value, first.weight_norm.value = 50_000, 0.25
    first.start.click()
    while first.progress.value < 1:
        time.sleep(0.01)
    again, _ = make_console(tmp_path)
    assert not first.training and again.soft_prompt is first.soft_prompt is not None
    assert again.weight_norm.value == 0.25 and not again.save.disabled and not again.start.disabled
    assert again.table.equals(first.table) and len(again.figure.data[0].x) == len(
        first.soft_prompt.history
    )


def test_the_console_says_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"start='default' must be a text prompt of \['short'\]"):
        make_console(tmp_path, start="default")
    o = organism()
    with pytest.raises(ValueError, match=r"no states under \['more'\]"):
        dro_console(measured(o, prompts={"more": "x"}), start="more", out=tmp_path)


def test_controls_are_labelled_and_the_boxes_can_be_found(tmp_path):
    explorer, inspector = make_explorer()[0], make_inspector()[0]
    for w, kind in (
        (explorer, "explorer"),
        (inspector, "inspector"),
        (make_probe()[0], "probe"),
        (make_console(tmp_path)[0], "console"),
    ):
        assert f"al-{kind}" in w.view._dom_classes
        controls = [
            part
            for part in walk(w.view)
            if hasattr(part, "description") and not hasattr(part, "placeholder")
        ]
        named = [getattr(w, name) for name in w._choices if getattr(w, name) in walk(w.view)]
        assert len(named) >= 3 and all(part.description for part in (*controls, *named))
        assert not any(
            getattr(part, "description_allow_html", False) for part in (*controls, *named)
        )
