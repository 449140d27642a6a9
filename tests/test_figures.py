"""What the figures contain: traces, coordinates, arrows, boundary, labels; never pixels."""

from __future__ import annotations

import re
from importlib import import_module
from pkgutil import iter_modules

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from browser import needs_browser

from analysis_lib import figures
from analysis_lib.analysis.directions import Direction
from analysis_lib.figures import style

PROMPTS = ("none", "default", "short", "mistral")
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)><b>HOSTILE</b>"
REFUSAL = Direction("refusal", np.array([1.2, 0.6, 0.8, -0.5]), -0.7)
HARMFULNESS = Direction("harmfulness", np.array([0.9, -1.1, 0.2, 0.1]), 0.3)


def make_points(prompts=PROMPTS, n=12, seed=0, mark="", mean=(0.0, 0.0, 0.5, -0.3)):
    """n harmless and n harmful queries under every prompt; the shift grows with the prompt's place."""
    rng = np.random.default_rng(seed)
    rows, Z = [], []
    for i in range(2 * n):
        harmful = i >= n
        own = (
            np.array(mean)
            + rng.normal(size=4) * 0.5
            + (2 if harmful else -2) * np.array([1, -0.5, 0, 0])
        )
        for at, prompt in enumerate(prompts):
            rows.append(
                (
                    f"q{i:03d}{mark}",
                    prompt,
                    harmful,
                    f"How do I do thing {i}?{mark}",
                    ((i + at) % 21) / 20,
                )
            )
            Z.append(
                own
                + at * np.array([0.4, 0.5, 0, 0]) * (1.5 if harmful else 1)
                + rng.normal(size=4) * 0.05
            )
    table = pd.DataFrame(rows, columns=["query_id", "prompt", "harmful", "text", "refusal_rate"])
    return figures.points_table(np.array(Z), table.astype({"harmful": "boolean"}))


def named(fig, name):
    (trace,) = [t for t in fig.data if t.name == name]
    return trace


def arrows(fig):
    return [t for t in fig.data if t.marker.symbol == "arrow"]


def group_mean(points, prompt, harmful, columns=("pc1", "pc2")):
    part = points[(points["prompt"] == prompt) & (points["harmful"] == harmful)]
    return part[list(columns)].mean().to_numpy(float)


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from strings(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from strings(v)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        yield from strings(value.tolist())


def test_points_table_rounds_and_replaces_old_coordinates():
    rows = pd.DataFrame(
        {"query_id": ["a", "b"], "prompt": "none", "pc1": 9.0, "pc7": 9.0}, index=[5, 3]
    )
    table = figures.points_table(np.array([[0.123456, 1.0], [2.0, -1e-9]]), rows)
    assert list(table.columns) == ["query_id", "prompt", "pc1", "pc2"]
    assert table["pc1"].tolist() == [0.1235, 2.0] and table["query_id"].tolist() == ["a", "b"]
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for 2 rows"):
        figures.points_table(np.zeros((3, 2)), rows)


def test_groups_are_told_by_marker_and_hue():
    points = make_points()
    fig = figures.plot_groups(points)
    for at, prompt in enumerate(PROMPTS):
        for cls, symbol in (("harmless", "circle-open"), ("harmful", "cross")):
            trace = named(fig, f"{cls}, {prompt}")
            part = points[(points["prompt"] == prompt) & (points["harmful"] == (cls == "harmful"))]
            assert (trace.marker.symbol, trace.marker.color) == (symbol, figures.PROMPT_COLORS[at])
            np.testing.assert_array_equal(trace.x, part["pc1"])
            np.testing.assert_array_equal(trace.y, part["pc2"])
            assert len(trace.hovertext) == 12 and trace.hovertext[0].startswith(
                f"<b>{part['query_id'].iloc[0]}</b>"
            )
            assert f"refusal rate: {part['refusal_rate'].iloc[0]:.2f}" in trace.hovertext[0]
            assert (
                f"prompt: {prompt}" in trace.hovertext[0] and f"{cls} query" in trace.hovertext[0]
            )
    assert sum(t.mode == "markers" and t.visible is not False for t in fig.data) == 8


def test_unlabelled_queries_have_a_marker_of_their_own():
    points = make_points(("none",))
    points.loc[:2, "harmful"] = pd.NA
    fig = figures.plot_groups(points, arrows=None)
    trace = named(fig, "unlabelled, none")
    assert len(trace.x) == 3 and trace.marker.symbol == "triangle-up-open"


def test_more_prompts_than_hues_change_shape():
    fig = figures.plot_groups(make_points(("none", *"abcdefg")))
    shown = [t for t in fig.data if t.mode == "markers" and t.visible]
    looks = {(t.marker.color, t.marker.symbol) for t in shown}
    assert len(shown) == len(looks) == 16
    assert (
        named(fig, "harmless, d").marker.symbol == "square-open"
        and named(fig, "harmful, d").marker.symbol == "x"
    )


def pixel(fig):
    """Units of the axes per pixel."""
    width = fig.layout.width - fig.layout.margin.l - fig.layout.margin.r
    return (fig.layout.xaxis.range[1] - fig.layout.xaxis.range[0]) / width


def test_mean_shift_arrows_go_from_the_mean_without_prompt_to_each_mean():
    points = make_points()
    fig = figures.plot_groups(points, components=(2, 3))
    found = {(t.marker.color, t.line.dash): t for t in arrows(fig)}
    assert len(found) == 6
    for at, prompt in enumerate(PROMPTS[1:], start=1):
        for harmful, dash in ((True, "solid"), (False, "dot")):
            trace = found[figures.PROMPT_COLORS[at], dash]
            tail, head = (group_mean(points, p, harmful, ("pc2", "pc3")) for p in ("none", prompt))
            moved = np.array([trace.x[0], trace.y[0]]) - tail
            assert np.hypot(*moved) <= 1.01 * style.LANE * pixel(fig)
            np.testing.assert_allclose(
                [trace.x[1], trace.y[1]], head + moved, atol=3e-4
            )  # length and way are true
            assert (
                "none ({:.2f}, {:.2f}) to {} ({:.2f}, {:.2f})".format(*tail, prompt, *head)
                in trace.hovertext
            )
            assert trace.marker.angleref == "previous" and trace.marker.size[0] == 0
    assert not arrows(figures.plot_groups(points, arrows=None))
    two = figures.plot_groups(
        points[points["prompt"].isin(["none", "short"])]
    )  # one arrow needs no room
    assert (arrows(two)[1].x[0], arrows(two)[1].y[0]) == pytest.approx(
        tuple(group_mean(points, "none", True)), abs=2e-4
    )


def test_arrows_that_coincide_lie_side_by_side_on_a_white_edge():
    points = make_points()
    default = points["prompt"] == "default"
    points.loc[points["prompt"] == "mistral", ["pc1", "pc2"]] = points.loc[
        default, ["pc1", "pc2"]
    ].to_numpy()
    fig = figures.plot_groups(points)
    for dash in ("solid", "dot"):
        own = {t.marker.color: np.array([t.x, t.y]).T for t in arrows(fig) if t.line.dash == dash}
        one, other = (own[figures.PROMPT_COLORS[i]] for i in (1, 3))
        apart, way = other[0] - one[0], one[1] - one[0]
        np.testing.assert_allclose(other[1] - one[1], apart, atol=3e-4)
        assert np.hypot(*apart) >= 0.9 * style.LANE * pixel(fig) and style.LANE > style.ARROW
        assert abs(apart @ way) < 0.1 * np.hypot(*apart) * np.hypot(
            *way
        )  # across the arrows, not along
    drawn = list(fig.data)
    for first in (i for i, t in enumerate(drawn) if t.line.color == "#FFFFFF"):
        edge, own = drawn[first], drawn[first + 1 : first + 4]
        assert edge.line.width > style.ARROW and all(t.marker.symbol == "arrow" for t in own)
        assert list(edge.x) == [v for t in own for v in (*t.x, None)] and list(edge.y) == [
            v for t in own for v in (*t.y, None)
        ]
    assert sum(t.line.color == "#FFFFFF" for t in drawn) == 2
    some = figures.plot_groups(points, prompts=["none", "short"])
    assert [len(t.x) for t in some.data if t.line.color == "#FFFFFF"] == [
        3,
        3,
    ]  # hidden arrows leave no edge


@pytest.mark.parametrize("components", [(1, 2), (2, 4), (3, 1)])
@pytest.mark.parametrize("direction", [REFUSAL, HARMFULNESS])
def test_boundary_is_where_the_logit_is_zero_and_the_arrow_its_gradient(direction, components):
    points = make_points()
    fig = figures.plot_groups(points, direction=direction, components=components, arrows=None)
    line = named(fig, f"{direction.name} boundary")
    at = points[["pc1", "pc2", "pc3", "pc4"]].mean().to_numpy()
    x, y = (c - 1 for c in components)
    ends = np.tile(at, (2, 1))
    ends[:, x], ends[:, y] = line.x, line.y
    np.testing.assert_allclose(direction.logit(ends), 0, atol=5e-4)
    assert np.hypot(*np.diff([line.x, line.y]).ravel()) > 1
    (arrow,) = arrows(fig)
    way = np.array([arrow.x[1] - arrow.x[0], arrow.y[1] - arrow.y[0]])
    np.testing.assert_allclose(
        way / np.linalg.norm(way),
        direction.weight[[x, y]] / np.hypot(*direction.weight[[x, y]]),
        atol=1e-3,
    )
    assert (
        arrow.text[1] == {"refusal": "more refusal", "harmfulness": "more harmful"}[direction.name]
    )


def test_boundary_out_of_view_is_said_and_not_drawn():
    points = make_points()
    fig = figures.plot_groups(
        points, direction=Direction("refusal", np.array([1.0, 0, 0, 0]), -1000.0), arrows=None
    )
    assert named(fig, "refusal: out of view").x == (None,)
    flat = figures.plot_groups(
        points, direction=Direction("refusal", np.array([0, 0, 1.0, 0]), 0.0), arrows=None
    )
    assert named(flat, "refusal: out of view").x == (None,)
    assert np.isnan(arrows(flat)[0].x[1])


@pytest.mark.parametrize("degrees", range(0, 360, 30))
@pytest.mark.parametrize("reach", [0.0, 0.75])
def test_a_directions_arrow_stays_in_view(degrees, reach):
    """Plotly hides a head that lies outside; the boundary may pass near any edge."""
    points = make_points()
    way = np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), 0, 0])
    low, high = points[["pc1", "pc2"]].min().to_numpy(), points[["pc1", "pc2"]].max().to_numpy()
    edge = (low + high) / 2 + reach * (high - low) / 2 * way[:2]
    for direction in (
        Direction("refusal", way, -float(way[:2] @ edge)),
        Direction("refusal", -way, float(way[:2] @ edge)),
    ):
        fig = figures.plot_groups(points, direction=[direction, HARMFULNESS], arrows=None)
        assert len(arrows(fig)) == 2
        for arrow in arrows(fig):
            for ends, axis in ((arrow.x, fig.layout.xaxis), (arrow.y, fig.layout.yaxis)):
                room = 0.07 * (axis.range[1] - axis.range[0])
                assert axis.range[0] + room <= ends[1] <= axis.range[1] - room
                assert axis.range[0] <= ends[0] <= axis.range[1]
            length = np.hypot(arrow.x[1] - arrow.x[0], arrow.y[1] - arrow.y[0])
            assert length == pytest.approx(
                0.16 * (fig.layout.yaxis.range[1] - fig.layout.yaxis.range[0]), rel=1e-2
            )


def test_labels_on_points_have_a_halo():
    fig = figures.plot_dro(make_points(("none", "default")), direction=REFUSAL)
    labelled = [t for t in arrows(fig) if t.text[1]]
    assert {t.text[1] for t in labelled} == {"harmless", "harmful", "more refusal"}
    for trace in labelled:
        assert "#FFFFFF" in trace.textfont.shadow
        assert 1.05 / (luminance(trace.textfont.color) + 0.05) >= 4.5  # text against its halo


def test_view_holds_all_points_in_equal_aspect():
    points = make_points()
    fig = figures.plot_groups(points, explained=(0.474, 0.21, 0.16, 0.06), components=(1, 3))
    x, y = fig.layout.xaxis, fig.layout.yaxis
    assert (x.title.text, y.title.text) == ("PC1 (47 % of variance)", "PC3 (16 % of variance)")
    assert (y.scaleanchor, y.scaleratio) == ("x", 1)
    assert x.range[0] < points["pc1"].min() and points["pc1"].max() < x.range[1]
    assert y.range[0] < points["pc3"].min() and points["pc3"].max() < y.range[1]
    margin = fig.layout.margin
    plot = (fig.layout.width - margin.l - margin.r, fig.layout.height - margin.t - margin.b)
    assert (x.range[1] - x.range[0]) / (y.range[1] - y.range[0]) == pytest.approx(
        plot[0] / plot[1], rel=1e-3
    )
    assert figures.plot_groups(points).layout.xaxis.title.text == "PC1"


def test_hidden_prompts_change_neither_colours_nor_view():
    points = make_points()
    every, some = (
        figures.plot_groups(points),
        figures.plot_groups(points, prompts=["default", "mistral"]),
    )
    assert len(every.data) == len(some.data)
    assert some.layout.xaxis.range == every.layout.xaxis.range
    assert named(some, "harmful, mistral").marker.color == figures.PROMPT_COLORS[3]
    assert not named(some, "harmful, short").visible and named(some, "harmful, mistral").visible
    assert sum(t.visible for t in arrows(some)) == 4
    with pytest.raises(ValueError, match=r"no points of prompt \['polite'\]"):
        figures.plot_groups(points, prompts=["polite"])


def test_colour_by_refusal_rate():
    points = make_points(("none", "default"))
    points.loc[0, "refusal_rate"] = np.nan
    fig = figures.plot_groups(points, color="refusal_rate")
    axis = fig.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 1) and axis.colorbar.title.text == "refusal rate"
    trace = fig.data[0]
    expected = points[(points["prompt"] == "none") & ~points["harmful"]]["refusal_rate"]
    assert trace.marker.color[0] == style.UNKNOWN and "not judged" in trace.hovertext[0]
    np.testing.assert_allclose(np.array(trace.marker.color[1:], dtype=float), expected[1:])
    assert [
        t.name for t in fig.data if t.mode == "markers" and t.visible and t.showlegend is not False
    ] == [
        "harmless",
        "harmful",
    ]
    lines = {
        t.name: t.line.color
        for t in fig.data
        if t.mode == "lines" and "none to" in (t.name or "") and t.visible
    }
    assert list(lines) == ["none to default"] and {t.line.color for t in arrows(fig)} == set(
        lines.values()
    )
    longer = figures.plot_groups(
        points.assign(shift_length=points["pc1"].abs() * 3), color="shift_length"
    )
    assert longer.layout.coloraxis.cmax == pytest.approx(points["pc1"].abs().max() * 3, abs=1e-3)


def luminance(color):
    c = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [
        0.2126,
        0.7152,
        0.0722,
    ]


def over(color, back, opacity):
    return "#" + "".join(
        f"{round(opacity * int(color[i : i + 2], 16) + (1 - opacity) * int(back[i : i + 2], 16)):02X}"
        for i in (1, 3, 5)
    )


@pytest.mark.parametrize(
    "color", [figures.GREY, style.UNKNOWN, *figures.PROMPT_COLORS, *(c for _, c in style.SCALE)]
)
@pytest.mark.parametrize("opacity", [1, style.OPACITY])
def test_text_points_and_scale_have_contrast_on_white_and_near_black(color, opacity):
    """WCAG 2.2, 1.4.11: 3 to 1 for graphics."""
    assert 1.05 / (luminance(over(color, "#FFFFFF", opacity)) + 0.05) >= 3
    assert (luminance(over(color, "#111111", opacity)) + 0.05) / (luminance("#111111") + 0.05) >= 3


def test_no_point_is_fainter_than_the_contrast_allows():
    for fig in every_figure():
        for trace in fig.data:
            assert (
                min(o for o in (trace.opacity, trace.marker.opacity, 1.0) if isinstance(o, float))
                >= style.OPACITY
            )


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
COLOUR_BLIND = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
    "none": np.eye(3),
}


@pytest.mark.parametrize("kind", COLOUR_BLIND)
def test_the_hues_of_the_prompts_hold_under_colour_blindness(kind):
    c = np.array(
        [[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in figures.PROMPT_COLORS]
    )
    seen = np.clip(
        np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        @ np.transpose(COLOUR_BLIND[kind]),
        0,
        1,
    )
    xyz = seen @ np.array(
        [
            [0.4124564, 0.2126729, 0.0193339],
            [0.3575761, 0.7151522, 0.1191920],
            [0.1804375, 0.0721750, 0.9503041],
        ]
    )
    f = xyz / [0.95047, 1, 1.08883]
    f = np.where(f > 0.008856, np.cbrt(f), 7.787 * f + 16 / 116)
    lab = np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)[np.triu_indices(4, 1)]
    assert apart.min() >= 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(components=(1, 5)), "lacks column 'pc5'"),
        (dict(color="logit"), "lacks column 'logit'"),
        (dict(base="blank"), "arrows' base 'blank'"),
        (dict(arrows="all"), "arrows='all' is unknown"),
        (dict(direction=Direction("refusal", np.ones(6), 0.0)), "'pc5', 'pc6'"),
    ],
)
def test_plot_groups_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        figures.plot_groups(make_points(), **change)
    with pytest.raises(ValueError, match="the points table is empty"):
        figures.plot_groups(make_points().iloc[:0])


def test_dro_path_is_dashed_then_solid():
    points = make_points(("dro", "default", "none", "short"))
    fig = figures.plot_dro(points, ("none", "default", "dro"), direction=REFUSAL)
    path = [t for t in arrows(fig) if t.marker.color != figures.GREY]
    assert [t.line.dash for t in path] == ["dash", "dash", "solid", "solid"]
    assert [t.text[1] for t in path] == ["", "", "harmless", "harmful"]
    for trace, (tail, head, harmful) in zip(
        path,
        [
            ("none", "default", False),
            ("none", "default", True),
            ("default", "dro", False),
            ("default", "dro", True),
        ],
        strict=True,
    ):
        np.testing.assert_allclose(
            [trace.x[0], trace.y[0]], group_mean(points, tail, harmful), atol=1e-4
        )
        np.testing.assert_allclose(
            [trace.x[1], trace.y[1]], group_mean(points, head, harmful), atol=1e-4
        )
    assert not any("short" in (t.name or "") for t in fig.data)
    assert named(fig, "refusal boundary").x[0] is not None
    with pytest.raises(ValueError, match=r"without points: \['soft'\]"):
        figures.plot_dro(points, ("none", "soft"))


def test_calibration_bins_are_means_of_their_points():
    table = pd.DataFrame(
        {"predicted": [0.01, 0.09, 0.95, 1.0, 0.5], "observed": [0.0, 0.2, 0.9, 1.0, np.nan]}
    )
    fig = figures.plot_calibration(table)
    binned = named(fig, "mean of a bin (of 10)")
    np.testing.assert_allclose(binned.x, [0.05, 0.975])
    np.testing.assert_allclose(binned.y, [0.1, 0.95])
    assert binned.hovertext == ("mean of 2 points", "mean of 2 points")
    assert len(named(fig, "query under a prompt").x) == 4
    assert (
        tuple(named(fig, "perfectly calibrated").x)
        == tuple(named(fig, "perfectly calibrated").y)
        == (0, 1)
    )


def test_calibration_against_the_projection_has_the_curve_of_the_prediction():
    projection = np.linspace(4, -4, 81)
    table = pd.DataFrame(
        {
            "projection": projection,
            "predicted": 1 / (1 + np.exp(-projection)),
            "observed": projection > 0,
        }
    )
    fig = figures.plot_calibration(table, x="projection", bins=2)
    curve = named(fig, "predicted probability")
    assert list(curve.x) == sorted(curve.x) and len(curve.x) == 81
    np.testing.assert_allclose(curve.y, 1 / (1 + np.exp(-np.array(curve.x))), atol=1e-4)
    binned = named(fig, "mean of a bin (of 2)")
    np.testing.assert_allclose(
        binned.x, [-2.05, 2.0], atol=1e-4
    )  # the point at 0 is predicted 0.5: the upper bin
    np.testing.assert_allclose(binned.y, [0, 40 / 41], atol=1e-4)
    assert "projection on the refusal direction" in fig.layout.xaxis.title.text
    assert fig.layout.xaxis.range is None
    with pytest.raises(ValueError, match="lacks column 'logit'"):
        figures.plot_calibration(table, x="logit")


def test_truth_has_the_diagonal_and_every_group():
    points = make_points(("none", "default"))
    table = points.assign(true_logit=points["pc1"], predicted_logit=points["pc1"] * 0.5)
    fig = figures.plot_truth(table)
    low, high = points["pc1"].min(), points["pc1"].max()
    assert (
        tuple(named(fig, "equal").x) == tuple(named(fig, "equal").y) == pytest.approx((low, high))
    )
    part = points[(points["prompt"] == "default") & points["harmful"]]
    np.testing.assert_allclose(named(fig, "harmful, default").x, part["pc1"])
    np.testing.assert_allclose(named(fig, "harmful, default").y, part["pc1"] * 0.5, atol=1e-4)


def test_losses_have_a_panel_each():
    history = pd.DataFrame(
        {
            "step": [0, 1, 2],
            "loss": [3.0, 2, 1],
            "refusal": [1.0, 1, 0],
            "norm": [0, 0.1, 0.2],
            "tag": "x",
        }
    )
    fig = figures.plot_losses(history)
    assert [t.name for t in fig.data] == ["loss", "refusal", "norm"]
    assert len({t.yaxis for t in fig.data}) == 3
    np.testing.assert_allclose(fig.data[0].y, [3, 2, 1])
    with pytest.raises(ValueError, match="no losses to draw"):
        figures.plot_losses(history[["step", "tag"]])


def make_benchmark(mark=""):
    rows = [
        (
            f"{model}{mark}",
            f"{method}{mark}",
            prompt,
            f"{query_set}{mark}",
            metric,
            0.1 * i + 0.02,
            0.1 * i,
            0.1 * i + 0.05,
            100,
        )
        for model in ("organism", "other")
        for i, (method, prompt) in enumerate(
            [("no prompt", "none"), ("text", "default"), ("DRO", "default")]
        )
        for metric, query_set in [
            ("compliance", "facts"),
            ("compliance", "anchor"),
            ("false refusal", "borderline"),
        ]
    ]
    columns = [
        "model",
        "method",
        "prompt",
        "query_set",
        "metric",
        "value",
        "low",
        "high",
        "n_queries",
    ]
    return pd.DataFrame(rows, columns=columns)


def test_benchmark_has_a_panel_per_metric_and_set_and_a_line_per_method_and_prompt():
    table = make_benchmark()
    table.loc[table["query_set"] == "anchor", "high"] += 0.4
    fig = figures.plot_benchmark(table)
    assert len(fig.data) == 6 and len({t.xaxis for t in fig.data}) == 3
    titles = [a.text for a in fig.layout.annotations]  # each panel's own: metric, then set
    assert titles == ["compliance<br>facts", "compliance<br>anchor", "false refusal<br>borderline"]
    assert "95 % intervals" in fig.layout.title.text
    ranges = [fig.layout[f"xaxis{i}"].range for i in ("", "2", "3")]
    assert ranges[0] == ranges[1]  # one metric, one scale
    for (low, high), metric in zip(
        ranges, ["compliance", "compliance", "false refusal"], strict=True
    ):
        assert (
            low < -0.005 and high > table[table["metric"] == metric]["high"].max()
        )  # a dot at 0 is not cut
    assert all(trace.cliponaxis is False for trace in fig.data)
    assert list(fig.layout.yaxis.ticktext) == [
        "no prompt / none",
        "text / default",
        "DRO / default",
    ]
    trace = fig.data[1]  # the second model in the first panel
    part = table[(table["model"] == "other") & (table["query_set"] == "facts")]
    np.testing.assert_allclose(trace.x, part["value"])
    np.testing.assert_allclose(trace.x + trace.error_x.array, part["high"])
    np.testing.assert_allclose(trace.x - trace.error_x.arrayminus, part["low"])
    np.testing.assert_allclose(np.round(trace.y), [0, 1, 2])
    assert "n_queries: 100" in trace.hovertext[0]
    assert [t.name for t in fig.data if t.showlegend] == ["organism", "other"]
    with pytest.raises(ValueError, match="two rows for 'no prompt / none', model 'organism'"):
        figures.plot_benchmark(pd.concat([table, table]))
    judged = pd.concat([table.assign(judge="published"), table.assign(judge="second")])
    assert (
        list(figures.plot_benchmark(judged).layout.yaxis.ticktext)[-1] == "DRO / default / second"
    )
    per_metric = table.assign(judge=table["metric"])  # one judge a panel: no line names it
    assert (
        figures.plot_benchmark(per_metric).layout.yaxis.ticktext
        == figures.plot_benchmark(table).layout.yaxis.ticktext
    )


def test_rates_stand_over_their_prompt_with_their_mean():
    points = make_points(("none", "default"))
    queries = points[["query_id", "harmful", "text"]].drop_duplicates()
    rates = points[["query_id", "prompt", "refusal_rate"]].sample(frac=1, random_state=0)
    fig = figures.plot_rates(rates, queries)
    part = points[(points["prompt"] == "default") & points["harmful"]]
    trace = named(fig, "harmful, default")
    assert sorted(trace.y) == pytest.approx(sorted(part["refusal_rate"]))
    tick = dict(zip(fig.layout.xaxis.ticktext, fig.layout.xaxis.tickvals, strict=True))
    assert all(abs(x - tick["default"]) < 0.5 for x in trace.x)
    means = {t.hovertext: t.y[0] for t in fig.data if t.name == "mean"}
    assert len(means) == 4
    (mean,) = [m for h, m in means.items() if "harmful queries, prompt default" in h]
    assert mean == pytest.approx(part["refusal_rate"].mean(), abs=1e-4)
    with pytest.raises(
        ValueError, match="12 rated queries are not among the queries, such as 'q012'"
    ):
        figures.plot_rates(rates, queries[~queries["harmful"]])


def test_shifts_stand_over_their_prompt_with_their_mean_and_a_line_at_zero():
    points = make_points()
    shifts = points[points["prompt"] != "none"].assign(shift=lambda t: t["pc1"] - 1)
    fig = figures.plot_shifts(shifts, axis="shift <along> PC1", prompts=PROMPTS)
    part = shifts[(shifts["prompt"] == "short") & ~shifts["harmful"]]
    trace = named(fig, "harmless, short")
    np.testing.assert_allclose(trace.y, part["shift"], atol=1e-4)
    assert trace.marker.color == figures.PROMPT_COLORS[2]  # as in a figure of all four prompts
    means = {t.hovertext: t.y[0] for t in fig.data if t.name == "mean"}
    (mean,) = [m for h, m in means.items() if "harmless queries, prompt short" in h]
    assert mean == pytest.approx(part["shift"].mean(), abs=1e-4) and len(means) == 6
    assert list(fig.layout.xaxis.ticktext) == ["default", "short", "mistral"]
    assert fig.layout.yaxis.title.text == "shift &lt;along&gt; PC1" and fig.layout.shapes[0].y0 == 0
    with pytest.raises(ValueError, match="lacks column 'shift'"):
        figures.plot_shifts(points)


def test_nearest_tokens_are_written_where_they_changed():
    table = pd.DataFrame(
        {
            "start": list("abca"),
            "nearest": ["a", " <x>", "c", "b"],
            "cosine": [0.99, 0.71, 1.0, 0.5],
        }
    )
    fig = figures.plot_nearest_tokens(table)
    same, changed = named(fig, "its own token (2)"), named(fig, "another token (2)")
    assert list(same.x) == [1, 3] and same.mode == "markers"
    assert (
        list(changed.x) == [2, 4]
        and list(changed.y) == [0.71, 0.5]
        and list(changed.text) == ["' &lt;x&gt;'", "'b'"]
    )
    assert fig.layout.showlegend
    assert (
        changed.marker.symbol != same.marker.symbol
        and "start: 'a'<br>nearest: 'b'" in changed.hovertext[1]
    )


def test_tradeoff_places_every_prompt_and_draws_its_intervals():
    table = pd.DataFrame(
        {"method": ["none", "DRO"], "prompt": ["none", "dro"], "harmful answered": [40.0, 10.0]}
    )
    table = table.assign(**{"harmless refused": [1.0, 3.5], "facts right": [100.0, np.nan]})
    bare = figures.plot_tradeoff(table).data[0]
    assert (
        list(bare.x) == [1, 3.5]
        and list(bare.y) == [40, 10]
        and list(bare.text) == ["none / none", "DRO / dro"]
    )
    assert bare.error_x.array is None and bare.marker.color[1] == style.UNKNOWN
    fig = figures.plot_tradeoff(
        table.assign(**{"harmful answered low": [35.0, 8.0], "harmful answered high": [42.0, 15.0]})
    )
    trace = fig.data[0]
    assert (
        list(trace.error_y.array) == [2, 5]
        and list(trace.error_y.arrayminus) == [5, 2]
        and trace.error_x.array is None
    )
    assert trace.error_y.color == figures.GREY  # plotly's own is black, which a dark page hides
    assert (
        "harmful answered: 40.0 %" in trace.hovertext[0]
        and fig.layout.xaxis.title.text == "harmless refused (%)"
    )
    with pytest.raises(ValueError, match="lacks column 'facts right'"):
        figures.plot_tradeoff(table.drop(columns="facts right"))


def test_a_grid_keeps_each_panel_as_it_is():
    panels = {
        name: figures.plot_groups(
            make_points(seed=seed), direction=REFUSAL, explained=(0.5, 0.2, 0.1, 0.1 * seed)
        )
        for seed, name in enumerate(("one", "two", "<three>"))
    }
    fig = figures.plot_grid(panels, title="Three models")
    layout = fig.layout
    for at, ((_, panel), axis) in enumerate(zip(panels.items(), ("", "2", "3"), strict=True)):
        own = [t for t in fig.data if t.xaxis == f"x{axis}"]
        assert len(own) == len(panel.data)
        for trace, before in zip(own, panel.data, strict=True):
            np.testing.assert_array_equal(trace.x, before.x)
            assert (trace.name, trace.marker.color) == (before.name, before.marker.color)
            assert trace.showlegend is before.showlegend if at == 0 else trace.showlegend is False
            assert trace.legendgroup == (
                before.legendgroup or before.name
            )  # a click in the legend reaches every panel
        assert (
            layout[f"xaxis{axis}"].range == panel.layout.xaxis.range
            and layout[f"yaxis{axis}"].scaleanchor == f"x{axis}"
        )
        assert layout[f"xaxis{axis}"].title.text == panel.layout.xaxis.title.text
    assert [a.text for a in layout.annotations] == ["one", "two", "&lt;three&gt;"]
    rated = figures.plot_grid({"one": figures.plot_groups(make_points(), color="refusal_rate")})
    assert (rated.layout.coloraxis.cmin, rated.layout.coloraxis.cmax) == (0, 1)
    with pytest.raises(ValueError, match="no figures"):
        figures.plot_grid({})


def test_separation_by_layer_and_by_prompt():
    table = pd.DataFrame({"layer": [-1, 0, 4, -1, 0, 4], "prompt": ["none"] * 3 + ["default"] * 3})
    table["accuracy"] = [0.9, 0.5, 0.8, 0.95, 0.55, 0.85]
    fig = figures.plot_separation(table)
    assert [t.name for t in fig.data] == ["none", "default"]
    np.testing.assert_allclose(fig.data[0].y, [0.5, 0.8, 0.9])
    assert list(fig.layout.xaxis.ticktext) == ["0", "4", "-1<br>(final norm)"]
    by_prompt = figures.plot_separation(
        table[table["layer"] == -1].drop(columns="layer").assign(low=0.8, high=1.0)
    )
    assert list(by_prompt.layout.xaxis.ticktext) == ["none", "default"]
    np.testing.assert_allclose(by_prompt.data[0].y, [0.9, 0.95])
    np.testing.assert_allclose(by_prompt.data[0].error_y.array, [0.1, 0.05])


def every_figure(mark="", **labels):
    prompts = tuple(f"{p}{mark}" for p in PROMPTS[:3])
    points = make_points(prompts, mark=mark)
    direction = Direction(f"refusal{mark}", REFUSAL.weight, REFUSAL.bias)
    yield figures.plot_groups(points, direction=direction, base=prompts[0], **labels)
    yield figures.plot_groups(points, color="refusal_rate", base=prompts[0], **labels)
    yield figures.plot_dro(points, direction=direction, **labels)
    yield figures.plot_calibration(points.assign(predicted=0.5, observed=0.4), **labels)
    yield figures.plot_truth(points.assign(predicted_logit=1.0, true_logit=2.0), **labels)
    yield figures.plot_losses(pd.DataFrame({"step": [0, 1], f"loss{mark}": [1.0, 0.5]}), **labels)
    yield figures.plot_benchmark(make_benchmark(mark), **labels)
    yield figures.plot_rates(
        points, points[["query_id", "harmful", "text"]].drop_duplicates(), **labels
    )
    yield figures.plot_separation(pd.DataFrame({"prompt": prompts, "accuracy": 0.9}), **labels)
    yield figures.plot_calibration(points.assign(predicted=0.5, observed=0.4), x="pc1", **labels)
    yield figures.plot_shifts(points.assign(shift=1.0), axis=f"shift{mark}", **labels)
    yield figures.plot_nearest_tokens(
        pd.DataFrame({"start": ["a"], "nearest": [f"b{mark}"], "cosine": [0.5]}), **labels
    )
    scores = {f"{column}{mark}": [1.0, 2.0] for column in "xyc"}
    axes = dict(zip(("x", "y", "color"), scores, strict=True))
    yield figures.plot_tradeoff(pd.DataFrame({"prompt": prompts[:2], **scores}), **axes, **labels)
    panels = {f"{name}{mark}": figures.plot_groups(points, base=prompts[0]) for name in "ab"}
    yield figures.plot_grid(panels, **labels)
    keys = [f"{column}{mark}" for column in ("model", "method", "prompt", "query_set")]
    dots = [(*keys, f"{metric}{mark}", 0.5, 0.4, 0.6) for metric in ("mean", "any")]
    yield figures.plot_by_model(
        pd.DataFrame(dots, columns=make_benchmark().columns[:8]), axis=f"axis{mark}", **labels
    )


def test_every_plot_function_has_its_figure_here(monkeypatch):
    """So a new one is drawn with hostile text, too."""
    rooms = [
        import_module(f"analysis_lib.figures.{m.name}") for m in iter_modules(figures.__path__)
    ]
    plots = {name for room in rooms for name in vars(room) if name.startswith("plot_")}
    assert plots == {name for name in figures.__all__ if name.startswith("plot_")}
    called = set()

    def counted(name, plot):
        return lambda *args, **kwargs: called.add(name) or plot(*args, **kwargs)

    for name in plots:
        monkeypatch.setattr(figures, name, counted(name, getattr(figures, name)))
    assert list(every_figure()) and called == plots


def test_hostile_text_reaches_plotly_escaped_everywhere():
    seen = 0
    for fig in every_figure(HOSTILE, title=HOSTILE, note=HOSTILE):
        for value in strings(fig.to_plotly_json()):
            value = value.removesuffix("<extra></extra>")  # the end of a hover template of ours
            assert not re.search(r"<(?!/?b>|br>)", value), value
            assert "<b>HOSTILE" not in value
            seen += "&lt;script&gt;" in value and "&quot;" not in value
    assert seen > 100


def test_quotes_stay_quotes():
    points = make_points(("none",), mark='\'s "own"')  # plotly knows no &quot; and would print it
    fig = figures.plot_groups(points, arrows=None)
    assert fig.data[0].hovertext[0].startswith('<b>q000\'s "own"</b>')


def test_long_names_leave_the_plot_its_room():
    name = "a-prompt-with-a-name-of-more-than-forty-characters"
    points = make_points(("none", name))
    for color in ("prompt", "refusal_rate"):
        fig = figures.plot_groups(points, color=color)
        assert (
            max(len(t.name or "") for t in fig.data) <= 24
            and max(len(t.text[1]) for t in arrows(fig)) <= 24
        )
        assert any(name in h for t in fig.data[:4] for h in t.hovertext)
    fig = figures.plot_benchmark(make_benchmark("-of-a-name-of-more-than-forty-characters"))
    assert max(map(len, fig.layout.yaxis.ticktext)) <= 40 and fig.layout.margin.l < 300


def test_long_text_without_spaces_is_wrapped_and_cut():
    points = make_points(("none",), n=1)
    points["text"] = "\u6f22" * 1000
    (line, *more) = figures.plot_groups(points, arrows=None).data[0].hovertext[0].split("<br>")[-7:]
    assert set(line) == {"\u6f22"} and len(line) == 64 and more[-1].endswith("...")


def test_every_figure_has_a_size_a_transparent_theme_and_its_note():
    note = "Embedded model: shows the method, proves nothing about 7B models. " * 4
    for plain, noted in zip(every_figure(), every_figure(note=note), strict=True):
        for fig in (plain, noted):
            assert 400 <= fig.layout.width <= 900 and 250 <= fig.layout.height <= 700
            assert (
                fig.layout.template.layout.paper_bgcolor
                == fig.layout.template.layout.plot_bgcolor
                == "rgba(0,0,0,0)"
            )
            assert fig.layout.template.layout.font.color == "#808080"
        assert not [a for a in plain.layout.annotations if a.name == "note"]
        (caption,) = [a for a in noted.layout.annotations if a.name == "note"]
        assert caption.text.replace("<br>", " ") == note.strip() and caption.yanchor == "bottom"
        room = (
            noted.layout.margin.b + caption.yshift
        )  # the caption's lower edge, from the bottom of the picture
        assert 0 <= room <= 10
        assert (
            noted.layout.height - noted.layout.margin.b
            == plain.layout.height - plain.layout.margin.b
        )


def test_users_own_figures_keep_plotlys_default_theme():
    assert pio.templates.default == "plotly"
    assert (
        go.Figure(layout=dict(template="analysis_lib")).layout.template.layout.font.color
        == "#808080"
    )


def test_save_html_works_offline_and_escapes(tmp_path):
    points = make_points(mark=HOSTILE)
    path = figures.save(figures.plot_groups(points), tmp_path / "new" / "groups.html")
    page = path.read_text()
    own = page[: page.index("<script")] + page[page.rindex("Plotly.newPlot") :]
    assert len(page) > 3_000_000 and not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert (
        "alert(1)" in own
        and "<script>alert" not in page
        and "<b>HOSTILE" not in page
        and "onerror=alert(2)>" not in own
    )


def test_save_refuses_other_suffixes(tmp_path):
    with pytest.raises(ValueError, match="use .svg, .png, .html"):
        figures.save(go.Figure(), tmp_path / "figure.bmp")


def test_save_without_chromium_says_what_to_do(tmp_path, monkeypatch):
    from kaleido.errors import ChromeNotFoundError

    def absent(*args, **kwargs):
        raise ChromeNotFoundError("no browser")

    monkeypatch.setattr(go.Figure, "to_image", absent)
    with pytest.raises(
        RuntimeError, match=r"figure\.png.*no browser.*install Chromium, or save as \.html"
    ):
        figures.save(go.Figure(), tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


@needs_browser
def test_save_pictures(tmp_path):
    fig = figures.plot_groups(make_points(n=100), direction=REFUSAL)
    png = figures.save(fig, tmp_path / "groups.png").read_bytes()
    assert (
        png.startswith(b"\x89PNG") and len(png) < 250_000
    )  # four of them fit into a notebook of 1 MB
    both = figures.save(fig, tmp_path / "both")
    svg = both.with_suffix(".svg").read_text()
    assert (
        svg.startswith("<svg")
        and "more refusal" in svg
        and both.with_suffix(".png").read_bytes() == png
    )
