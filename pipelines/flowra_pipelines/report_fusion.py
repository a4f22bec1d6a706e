"""The page of ``flowra fuse inspect``: warnings, texts and maps that say each weight, averages by layer.

As in ``flowra report``, the page has no script and no link to elsewhere, and forbids its browser to load anything. Maps
are tables: each cell holds its number, and says token, layer and all weights where the pointer rests.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files

import matplotlib as mpl
from torch import Tensor

from flowra_compose.fusion import FailureSign, GateInspection, TextWeights, WeightSummary
from flowra_pipelines.fusion_figures import (
    CAPTIONS,
    WeightScale,
    layer_labels,
    layer_means,
    visible,
    weight_scale,
)
from flowra_pipelines.profile_commands import printable
from flowra_pipelines.report_parts import picture, table

__all__ = ["fusion_page"]

STEPS = 41
"""Colours of weights; the middle one is white."""
CELLS = 12_000
"""Of all maps together; texts are cut to fit."""
TITLES = {
    "few positions": "Too little was seen",
    "unmoved": "Gates that have not moved",
    "same for all tokens": "The same for all tokens",
    "same in all layers": "The same in all layers",
    "ambiguous prefixes": "Ambiguous prefixes",
    "saturated": "Saturated",
    "out of range": "Weights out of range",
    "far sum": "Weights that do not sum to 1",
    "loss gap": "Training and validation: losses",
    "weight gap": "Training and validation: weights",
}


def fusion_page(
    inspection: GateInspection, texts: Sequence[TextWeights], signs: Sequence[FailureSign], *, title: str
) -> str:
    """Write the page.

    Args:
        inspection: of all texts.
        texts: those shown token by token, at least one.
        signs: what is warned of.
        title: of the page.

    Returns:
        HTML.
    """
    scale = weight_scale(inspection, texts)
    sections = [
        ("warnings", "Warnings", _signs(signs)),
        ("texts", "Texts", _texts(inspection, texts, scale)),
        ("maps", "Tokens and layers", _maps(inspection, texts, scale)),
        ("layers", "Average by layer", _layers(inspection)),
        ("modules", "All modules", _modules(inspection)),
    ]
    sections = [each for each in sections if each[2]]
    contents = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, name, content in sections)
    styles = ("report_style.css", "fusion_style.css")
    style = "".join(files("flowra_pipelines").joinpath(name).read_text(encoding="utf-8") for name in styles)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    shown = escape(printable(title))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Gates: {shown}</title><style>{style}{_colours(scale)}</style></head><body>"
        f'<div class="layout"><header><p class="overline">Gates</p><h1>{shown}</h1>'
        f'<p class="soft">How much of each adapter is taken, token by token.</p>{_numbers(inspection)}</header>'
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav><main>{body}</main></div></body></html>\n'
    )


def _numbers(inspection: GateInspection) -> str:
    """Show the sizes that everything else refers to."""
    shown = {
        "texts": f"{len(inspection.texts):,}",
        "tokens": f"{inspection.positions:,}",
        "gates": f"{len(inspection.places):,}",
        "level": inspection.level,
    }
    shown |= {f"weight of {name}": f"{mean:.2f}" for name, mean in _named_means(inspection)}
    rows = (f"<div><dt>{escape(printable(key))}</dt><dd>{value}</dd></div>" for key, value in shown.items())
    return f'<dl class="numbers">{"".join(rows)}</dl>'


def _signs(signs: Sequence[FailureSign]) -> str:
    if not signs:
        return "<p>No sign of failed training.</p>"
    return "".join(
        f'<div class="sign"><h3>{TITLES[sign.kind]}</h3><p>{escape(_plain(sign.found))}</p>'
        f"<p><strong>What to do.</strong> {escape(_plain(sign.advice))}</p></div>"
        for sign in signs
    )


def _texts(inspection: GateInspection, texts: Sequence[TextWeights], scale: WeightScale) -> str:
    """Write texts, each token on the colour of the most used adapter's weight, averaged over layers."""
    most = _most_used(inspection)
    name = escape(printable(inspection.adapters[most]))
    more = len(inspection.texts) - len(texts)
    of = f" The first {len(texts)} of {len(inspection.texts):,} texts are shown." if more else ""
    found = [
        f"<p>The colour is the weight of <strong>{name}</strong>, the most used adapter, averaged over layers. Dots"
        f" mark tokens at which most gates do not decide.{of}</p>{_key(scale)}"
    ]
    for text, ambiguous in zip(texts, inspection.ambiguous(), strict=False):
        means = inspection.layer_weights(text).mean(dim=0)
        spans = (
            _token(inspection, token, position, means[position], most, scale, undecided)
            for position, (token, undecided) in enumerate(zip(text.tokens, ambiguous.tolist(), strict=True))
        )
        found.append(f'<p class="tokens">{"".join(spans)}</p>')
    return "".join(found)


def _token(
    inspection: GateInspection,
    token: str,
    position: int,
    weights: Tensor,
    most: int,
    scale: WeightScale,
    undecided: bool,
) -> str:
    kind = _step(float(weights[most]), scale)
    note = "; most gates do not decide" if undecided and len(inspection.adapters) > 1 else ""
    said = f"{_quoted(token)}, token {position + 1}: {_said(inspection, weights)}{note}"
    open_class = " open" if note else ""
    return f'<span class="w{kind}{open_class}" title="{_attribute(said)}">{escape(_readable(token))}</span>'


def _key(scale: WeightScale) -> str:
    """Write what the colours mean."""
    spans = []
    for index in range(9):
        value = scale.centre + scale.reach * (index - 4) / 4
        spans.append(f'<span class="w{_step(value, scale)}">{value:.2f}</span>')
    return f'<p class="key" aria-hidden="true">{"".join(spans)}</p>'


def _maps(inspection: GateInspection, texts: Sequence[TextWeights], scale: WeightScale) -> str:
    """Write a table for each text and adapter, tokens down and layers across."""
    count, names = len(inspection.adapters), list(inspection.layers)
    limit = max(1, CELLS // (count * (len(names) + 1) * len(texts)))
    most = _most_used(inspection)
    order = [most, *(index for index in range(count) if index != most)]
    averaged = " Modules of a layer are averaged." if len(names) < len(inspection.places) else ""
    found = [f"<p>Colours as above, around 1/k = {scale.centre:.3g}.{averaged}</p>"]
    for number, text in enumerate(texts, start=1):
        weights = inspection.layer_weights(text)[:, :limit]
        cut = f", first {limit} of {len(text.tokens)} tokens" if len(text.tokens) > limit else ""
        for index in order:
            name = escape(printable(inspection.adapters[index]))
            state = " open" if number == 1 and index == most else ""
            found.append(
                f"<details{state}><summary>Text {number}, weights of {name}{cut}</summary>"
                f"{_map(inspection, text, weights, index, scale)}</details>"
            )
    return "".join(found)


def _map(inspection: GateInspection, text: TextWeights, weights: Tensor, adapter: int, scale: WeightScale) -> str:
    labels = layer_labels(list(inspection.layers))
    several = len(labels) > 1
    heads = [*labels, *(["mean"] if several else [])]
    top = "".join(f'<th scope="col">{escape(each)}</th>' for each in heads)
    rows = []
    for position, token in enumerate(text.tokens[: weights.shape[1]]):
        cells = []
        for layer, label in enumerate(labels):
            said = (
                f"{_quoted(token)}, token {position + 1}, layer {label}: {_said(inspection, weights[layer, position])}"
            )
            cells.append(_cell(float(weights[layer, position, adapter]), said, scale))
        if several:
            mean = weights[:, position].mean(dim=0)
            said = f"{_quoted(token)}, token {position + 1}, all layers: {_said(inspection, mean)}"
            cells.append(_cell(float(mean[adapter]), said, scale, " mean"))
        rows.append(f'<tr><th scope="row">{escape(_quoted(token))}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll heat" tabindex="0"><table><thead><tr><th scope="col">token</th>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(value: float, said: str, scale: WeightScale, extra: str = "") -> str:
    return f'<td class="w{_step(value, scale)}{extra}" title="{_attribute(said)}">{value:.2f}</td>'


def _layers(inspection: GateInspection) -> str:
    drawn = picture("layers", layer_means(inspection), CAPTIONS["layers"])
    return drawn + _summaries(inspection.by_layer(), inspection.adapters, "layer")


def _modules(inspection: GateInspection) -> str:
    if len(inspection.layers) == len(inspection.places):
        return ""
    shown = _summaries(inspection.by_place(), inspection.adapters, "module")
    return f"<details><summary>{len(inspection.places):,} modules</summary>{shown}</details>"


def _summaries(found: Sequence[WeightSummary], adapters: Sequence[str], heading: str) -> str:
    headings = [heading]
    for name in map(printable, adapters):
        headings += [f"{name}, mean", "spread", "lowest", "highest"]
    rows = []
    for each in found:
        numbers = zip(each.mean, each.spread, each.lowest, each.highest, strict=True)
        rows.append([printable(each.name) or "all", *(f"{value:.3f}" for four in numbers for value in four)])
    return table(headings, rows)


# words and colours


def _most_used(inspection: GateInspection) -> int:
    mean = inspection.mean()
    return mean.index(max(mean))


def _named_means(inspection: GateInspection) -> list[tuple[str, float]]:
    return list(zip(inspection.adapters, inspection.mean(), strict=True))


def _said(inspection: GateInspection, weights: Tensor) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in zip(inspection.adapters, weights.tolist(), strict=True))


def _quoted(token: str) -> str:
    return f"“{_plain(visible(token))}”"


def _readable(token: str) -> str:
    """Write a token for the text: ends of lines end the line, and can be seen."""
    return "".join({"\n": "↵\n", "\t": "\t"}.get(each) or _plain(each) for each in token)


def _plain(text: str) -> str:
    """Write what does not print as escapes, of a text of any length."""
    return "".join(map(printable, text))


def _attribute(text: str) -> str:
    """Escape text for an attribute; no address stands in the markup."""
    return escape(_plain(text)).replace("://", "&#58;//")


def _step(value: float, scale: WeightScale) -> int:
    return round(scale.position(value) * (STEPS - 1))


def _colours(scale: WeightScale) -> str:
    rules = []
    for step in range(STEPS):
        red, green, blue, _ = colour = scale.colours(step / (STEPS - 1))
        ink = "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#111111"
        rules.append(f".w{step} {{ background: {mpl.colors.to_hex(colour)}; color: {ink}; }}")
    return "\n".join(rules)
