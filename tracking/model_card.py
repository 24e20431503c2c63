"""The card of a registered model, Markdown for people: what it is for, how good it is, and where it is weak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# What the registry's database holds of a version's description.
MAX_DESCRIPTION = 5000
# Rows of a table by class: the weakest are what a reader has to know.
MAX_CLASSES = 12


@dataclass(frozen=True)
class Measured:
    """A number, and the interval that samples of the test pictures leave it in; None where it is not known."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ModelCard:
    """What a card says. Texts are Markdown without headings; scores are from 0 to 1, of the test split.

    `scores` by metric name, `rules` and `interval` say how they were made; `ap_by_size` and `recall_by_size` by what a
    size is called; `errors`: by type, the AP50 that is lost to it and how many there are at the operating point, whose
    score is `threshold`, None where there is none. `provenance` by what it is. `latency`: one sentence, empty where it
    was not measured.
    """

    name: str
    dataset: str
    licence: str
    sources: str
    data_version: str
    num_images: Mapping[str, int]
    classes: Sequence[str]
    architecture: str
    input: str
    recipe: str
    protocol: str
    rules: str
    scores: Mapping[str, Measured]
    interval: str
    ap_by_class: Mapping[str, float | None]
    ap_by_size: Mapping[str, float | None]
    recall_by_size: Mapping[str, tuple[int, int]]
    errors: Mapping[str, tuple[float, int]]
    threshold: float | None
    precision: float | None
    recall: float | None
    latency: str
    provenance: Mapping[str, str]


def as_markdown(card: ModelCard) -> str:
    """The whole card."""
    sections = {
        f"{card.architecture} on {card.name}": f"Finds {_listed(card.classes)}.",
        "Use": _use(card),
        "Data": _data(card),
        "Training": card.recipe,
        "Test scores": _scores(card),
        "Operating point": _operating_point(card),
        "Weaknesses": _weaknesses(card),
        "Speed": card.latency or "Not measured when it was registered; `speck evaluate` and `speck export` measure it.",
        "Where it comes from": "\n".join(f"- {name}: `{value}`" for name, value in card.provenance.items()),
    }
    return "\n".join(
        f"{'#' if place == 0 else '##'} {title}\n\n{text}\n" for place, (title, text) in enumerate(sections.items())
    )


def as_description(markdown: str, digest: str) -> str:
    """The card as a registered version's description: with the digest of the model's files, and cut where need be.

    A description that has the digest at its end keeps it there.
    """
    end = f"\nDigest of the model's files: `{digest}`\n"
    room, markdown = MAX_DESCRIPTION - len(end), markdown.removesuffix(end)
    if len(markdown) <= room:
        return markdown + end
    cut = "\n\nThe rest stands in model_card.md among the model's files.\n"
    return markdown[: room - len(cut)].rpartition("\n")[0] + cut + end


def _use(card: ModelCard) -> str:
    return (
        f"Made for pictures like those of `{card.name}`: {card.dataset.strip()}\n\n"
        f"Input: {card.input}\n\n"
        "Not for pictures taken otherwise (another camera, height, material or light) before it was scored on a sample "
        f"of them; not for anything but {_listed(card.classes)}; not as the only ground of a decision about people or "
        "about safety."
    )


def _data(card: ModelCard) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in card.num_images.items())
    return (
        f"`{card.name}`, version `{card.data_version}`{f' ({counts} pictures)' if counts else ''}. "
        f"Licence: {card.licence}. Source: {card.sources}."
    )


def _scores(card: ModelCard) -> str:
    rows = [f"| {name} | {_shown(score.value)} | {_interval(score)} |" for name, score in card.scores.items()]
    return "\n".join(
        [
            f"Protocol {card.protocol}; {card.rules}. {card.interval}",
            "",
            "| metric | test | 95% interval |",
            "|---|---|---|",
            *rows,
        ]
    )


def _operating_point(card: ModelCard) -> str:
    if card.threshold is None:
        return "None: on val no threshold gave a hit."
    return (
        f"Chosen on val for the highest F1 at IoU .50: take detections with a score of at least {card.threshold:.3f}. "
        f"On test that gives precision {_shown(card.precision)} and recall {_shown(card.recall)}. Thresholds of each "
        "class are in `artifacts/operating_point.json`."
    )


def _weaknesses(card: ModelCard) -> str:
    told = [f"- AP is lowest for {_weakest(card.ap_by_class)}."]
    if lost := {name: loss for name, (loss, _) in card.errors.items()}:
        worst = max(lost, key=lambda name: lost[name])
        told.append(
            f"- Most AP50 is lost to errors of type {worst}: {lost[worst]:.3f}, {card.errors[worst][1]} of them at the "
            "operating point."
        )
    sizes = ["| side | objects | found at the operating point | AP |", "|---|---|---|---|"]
    for size, (num_objects, num_found) in card.recall_by_size.items():
        share = f"{num_found / num_objects:.0%}" if num_objects else "-"
        note = "" if num_objects else " (never tested)"
        sizes.append(f"| {size}{note} | {num_objects} | {share} | {_shown(card.ap_by_size.get(size))} |")
    # Without objects nothing is known, which is the greatest weakness.
    known = sorted(card.ap_by_class, key=lambda name: card.ap_by_class[name] or 0.0)
    classes = ["| class | AP |", "|---|---|"]
    classes += [f"| {name} | {_shown(card.ap_by_class[name])} |" for name in known[:MAX_CLASSES]]
    if len(known) > MAX_CLASSES:
        classes.append(f"| {len(known) - MAX_CLASSES} more | above these |")
    return "\n".join([*told, "", *sizes, "", *classes])


def _weakest(ap_by_class: Mapping[str, float | None]) -> str:
    known = {name: value for name, value in ap_by_class.items() if value is not None}
    unknown = [name for name, value in ap_by_class.items() if value is None]
    told = []
    if known:
        name = min(known, key=lambda name: known[name])
        told.append(f"{name} ({known[name]:.3f})")
    if unknown:
        told.append(f"not known for {_listed(unknown)}, of which the test split has none")
    return "; ".join(told) or "no class"


def _interval(score: Measured) -> str:
    return "-" if score.low is None or score.high is None else f"{score.low:.3f} to {score.high:.3f}"


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:MAX_CLASSES])
    more = f" and {len(names) - MAX_CLASSES} more" if len(names) > MAX_CLASSES else ""
    return ", ".join(shown) + more


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
