"""Faithfulness: do scores say what the outcome really hangs on? Tokens are taken out in the scores' order, and at
random, and what the outcome does is held against the scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from ..ops import _check
from .actions import Actions
from .attribution import INPUTS, Attribution
from .intervention import Effects, Experiment
from .outcomes import Outcome
from .perturbation import Game, Request, features
from .step_values import StepValues
from .text import Ids, Span, check_count
from .tracker import CausalityTracker

FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)

Scores = Any


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How faithful scores are; float64, scalars, or [R] where the scores are [R, P + R].

    With f the outcome, top the features of the highest scores and k a share of all n features:

    Attributes:
        comprehensiveness: mean over k of f(text) - f(text without top k); higher is better.
        sufficiency: mean over k of f(text) - f(top k alone); lower is better.
        deletion_auc: area under f while the features go, the highest first, over the share that is gone; lower
            is better.
        insertion_auc: area under f while they come, the highest first, into a text without any; higher is better.
        infidelity: mean over random subsets of (sum of the scores of what is taken out - fall of f)^2; 0 if
            the scores are effects in an additive outcome. Scores in other units than f's have none to speak of.
        datamodelling_score: Spearman's correlation over random subsets of the sum of the scores of what is kept
            and f of it, in [-1, 1]; NaN where one of them is constant.
        deletion, insertion: [points + 1] or [R, points + 1] values of f behind the areas.
        features: n, or [R].
        tokens: that the policy computed for all scores of the call.
    """

    comprehensiveness: torch.Tensor
    sufficiency: torch.Tensor
    deletion_auc: torch.Tensor
    insertion_auc: torch.Tensor
    infidelity: torch.Tensor
    datamodelling_score: torch.Tensor
    deletion: torch.Tensor
    insertion: torch.Tensor
    features: torch.Tensor
    tokens: int


@dataclass(frozen=True)
class _Grid:
    """Which shares of the features are taken, and how many random subsets."""

    fractions: Sequence[float]
    points: int
    subsets: int
    keep: float

    def __post_init__(self) -> None:
        if isinstance(self.fractions, str) or not isinstance(self.fractions, Sequence):
            raise TypeError(f"fractions must be a sequence of shares, got {self.fractions!r}")
        if not self.fractions:
            raise ValueError("fractions must hold at least one share, got none")
        for i, share in enumerate(self.fractions):
            _check.number(f"fractions[{i}]", share, low=0.0, high=1.0)
        check_count("points", self.points, 1)
        check_count("subsets", self.subsets, 2)
        _check.number("keep", self.keep, low=0.0, high=1.0)

    def counts(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Features taken for the fractions, and at the points of the curves."""
        shares = [max(1, int(np.ceil(share * n - 1e-9))) for share in self.fractions]
        return np.array(shares), np.rint(np.linspace(0, n, self.points + 1)).astype(int)


def faithfulness(
    tracker: CausalityTracker,
    prompt_ids: Ids,
    response_ids: Ids,
    scores: Mapping[str, Scores],
    outcome: Outcome = "logprob",
    samples: int | None = None,
    *,
    actions: Actions | None = None,
    inputs: str = "all",
    counterfactual: Any = None,
    fractions: Sequence[float] = FRACTIONS,
    points: int = 10,
    subsets: int = 64,
    keep: float = 0.5,
    max_new_tokens: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Faithfulness]:
    """Faithfulness of one text's scores, from any method, all held against the same perturbed texts.

    f is the outcome of the text with the counterfactual in the place of some features. "logprob" is the
    log-probability of the response as it was: a token that is taken out is not read, but still asked for. The
    others are those of `CausalityTracker.intervene`, and with `samples` f is the mean over n continuations of the
    perturbed prompt under the same noise ("logprob": of the n that the prompt as it was had).

    Features are the tokens, or `actions`, that can change f: of "logprob" all but the last token, of a function
    of response ids those of the response, with `samples` those of the prompt. If the counterfactual leaves nothing
    in their place, the first prompt token stays.

    Args:
        tracker: CausalityTracker.
        prompt_ids, response_ids: [P] and [R] token ids, at least one each.
        scores: by name, each one of
            array, sequence or tensor [P + R], a higher score for a token that raises the outcome more;
            [R, P + R], for "logprob" without `samples`: row i of response token i's own log-probability, whose
            features are the tokens before it; without any, falls are 0 and the datamodelling score is NaN;
            Attribution; Effects, whose actions' means are spread evenly over their tokens; or StepValues, for
            their effects. Features of equal scores go in the order of the text.
        outcome, samples, max_new_tokens: as of `CausalityTracker.intervene`.
        actions: places (start, end) that are one feature each, in order and without overlap, or a name or a
            regular expression as of `CausalityTracker.intervene`; a feature's score is the sum of its tokens'.
            None: tokens.
        inputs: "all", or "prompt" for features of the prompt alone.
        counterfactual: Deletion(), Replacement(id) or an object with a method replacement(tokens); None: the
            tracker's `interventions`.
        fractions: shares k of comprehensiveness and sufficiency, in [0, 1]; at least one feature is taken.
        points: steps of the deletion and insertion curves, each rounded to whole features, at least 1.
        subsets: random ones for infidelity and the datamodelling score, at least 2.
        keep: chance of a feature to be kept in one, in [0, 1].
        max_tokens: budget: most tokens that the policy may compute, counted as if there were no cache; fewer
            subsets are taken where it is short.
    Returns: Faithfulness by name.
    Raises: TypeError, ValueError or IndexError in one line.
    Source: DeYoung et al. 2020, ERASER (arXiv:1911.03429), comprehensiveness and sufficiency, here the mean over
        the shares without the empty one; Samek et al. 2017 (arXiv:1509.06321) and Petsiuk et al. 2018, RISE
        (arXiv:1806.07421), deletion and insertion; Yeh et al. 2019 (arXiv:1901.09392), infidelity for
        perturbations that remove; Park et al. 2023, TRAK (arXiv:2303.14186), and Cohen-Wang et al. 2024,
        ContextCite (arXiv:2409.00729), linear datamodelling score.
    """
    if not isinstance(tracker, CausalityTracker):
        raise TypeError(f"tracker must be a CausalityTracker, got {type(tracker).__name__}")
    policy, before = tracker.policy, tracker.policy.tokens
    grid = _Grid(fractions, points, subsets, keep)
    text = tracker._experiment(
        tracker._text(prompt_ids, response_ids),
        counterfactual,
        outcome,
        samples=samples,
        limit=max_new_tokens,
        max_tokens=max_tokens,
    )
    texts = None if tracker.tokenizer is None else tracker.texts(text.ids)
    spans = features(text, actions, texts, _check.choice("inputs", inputs, INPUTS), policy.vocab_size)
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores must be a mapping of names to scores, got {type(scores).__name__}")
    if not scores:
        raise ValueError("scores must hold at least one name, got none")
    tables = {name: _table(name, value, text) for name, value in scores.items()}
    game = Game(policy, text, spans)
    kept = _subsets(game, grid, list(tables.values()))
    whole = game.values(np.vstack([np.ones((1, len(spans)), dtype=bool), kept]))
    found = {name: _measured(game, grid, table, kept, whole) for name, table in tables.items()}
    tokens = policy.tokens - before
    return {name: Faithfulness(**measures, tokens=tokens) for name, measures in found.items()}


def _table(name: str, value: Scores, text: Experiment) -> np.ndarray:
    """[P + R] or [R, P + R] float64."""
    size = len(text.ids)
    if isinstance(value, StepValues):
        value = value.effects
    if isinstance(value, (Attribution, Effects)) and value.token_ids != text.ids:
        raise ValueError(f"scores[{name!r}] must be of this prompt and response, got those of another text")
    if isinstance(value, Effects):
        table = np.zeros(size)
        for (start, end), mean in zip(value.spans, value.mean.tolist(), strict=True):
            table[start:end] += mean / (end - start)
        return table
    given = value.scores if isinstance(value, Attribution) else value
    if isinstance(given, torch.Tensor):
        given = given.detach().double().cpu().numpy()
    table = np.asarray(given, dtype=np.float64)
    wanted: list[tuple[int, ...]] = [(size,)]
    if text.outcome == "logprob" and text.samples is None:
        wanted.append((size - text.prompt_length, size))
    if table.shape not in wanted:
        shapes = " or ".join(str(list(shape)) for shape in wanted)
        raise ValueError(f"scores[{name!r}] must be {shapes}, got {list(table.shape)}")
    if not np.isfinite(table).all():
        raise ValueError(f"scores[{name!r}] must be finite, got {table[~np.isfinite(table)][0]}")
    return table


def _subsets(game: Game, grid: _Grid, tables: Sequence[np.ndarray]) -> np.ndarray:
    """[subsets, A] bool: the random ones, as many as the budget allows; the curves' texts come first."""
    text, count = game.text, grid.subsets
    if text.max_tokens is not None:
        curves = 2 * (len(grid.fractions) + grid.points + 1)
        fixed = 1 + curves * sum(len(table) if table.ndim == 2 else 1 for table in tables)
        count = min(count, text.max_tokens // game.cost - fixed)
        if count < 2:
            raise ValueError(
                f"max_tokens must be at least {(fixed + 2) * game.cost} for {len(tables)} scores, "
                f"got {text.max_tokens}"
            )
    draws = np.random.Generator(np.random.Philox(text.seed)).random((grid.subsets, len(game.spans)))
    return draws[:count] < grid.keep


def _measured(
    game: Game, grid: _Grid, table: np.ndarray, kept: np.ndarray, values: np.ndarray
) -> dict[str, torch.Tensor]:
    """The measures of one table of scores; `values` [1 + subsets, R or 1] are of the text and of the subsets."""
    start, end = game.text.prompt_length, len(game.text.ids)
    rows = table if table.ndim == 2 else table[None]
    asked = [(t, t + 1) for t in range(start, end)] if table.ndim == 2 else [(start, end)]
    outcome = values if table.ndim == 2 else values.sum(1, keepdims=True)
    sums = np.array([[row[a:b].sum() for a, b in game.spans] for row in rows])
    reaching = [
        [i for i, (a, _) in enumerate(game.spans) if table.ndim == 1 or a < first] for first, _ in asked
    ]
    curves = _curves(game, grid, sums, reaching, asked)
    found = []
    for r, chosen in enumerate(reaching):
        gone, alone, deletion, insertion = curves[r]
        removed = ~kept[:, chosen]
        falls = outcome[0, r] - outcome[1:, r]
        found.append(
            {
                "comprehensiveness": outcome[0, r] - gone.mean(),
                "sufficiency": outcome[0, r] - alone.mean(),
                "deletion_auc": _area(deletion),
                "insertion_auc": _area(insertion),
                "infidelity": np.mean((removed @ sums[r, chosen] - falls) ** 2),
                "datamodelling_score": spearman(~removed @ sums[r, chosen], outcome[1:, r]),
                "deletion": deletion,
                "insertion": insertion,
                "features": len(chosen),
            }
        )
    stacked = {key: torch.from_numpy(np.array([one[key] for one in found])) for key in found[0]}
    return stacked if table.ndim == 2 else {key: value[0] for key, value in stacked.items()}


def _curves(
    game: Game, grid: _Grid, sums: np.ndarray, reaching: Sequence[list[int]], asked: Sequence[Span]
) -> list[list[np.ndarray]]:
    """By row: f without the top shares, f of them alone, and f along the deletion and the insertion curve."""
    requests: list[Request] = []
    cuts: list[int] = []
    for row, chosen, (first, end) in zip(sums, reaching, asked, strict=True):
        order = np.array(chosen, dtype=int)[np.argsort(-row[chosen], kind="stable")]
        shares, points = grid.counts(len(order))
        for counts, keeps in ((shares, False), (shares, True), (points, False), (points, True)):
            for count in counts:
                kept = np.ones(row.shape, dtype=bool)
                kept[order[count:] if keeps else order[:count]] = False
                requests.append((kept, first, end))
            cuts.append(len(requests))
    parts = np.split(game.sums(requests), cuts[:-1])
    return [parts[i : i + 4] for i in range(0, len(parts), 4)]


def _area(curve: np.ndarray) -> float:
    """Of the trapezoids under equally far points, over [0, 1]."""
    return float((curve[1:] + curve[:-1]).mean() / 2)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks [n], ties with their mean rank; NaN for a constant."""
    ranks = [stats.rankdata(x) - (len(x) + 1) / 2 for x in (a, b)]
    scale = np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1] / scale) if scale > 0 else float("nan")
