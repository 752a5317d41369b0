"""Vocabulary expansion (AdjointDPM, Pan et al. 2024, section 4.1.1 and appendix B).

A fine-grained classifier knows kinds for which the pipeline has no word. Its score of the *finished* picture,
``-log p(kind | picture)`` on the mean over random crops, is descended through the whole sampling run:

- ``over="noise"`` (the paper's): each noise by itself, until its picture shows the kind;
- ``over="word"``: one embedding that all prompts and noises share, so that the kind has a word from then on. The word
  is tried on noises it was not learnt from.

A classifier alone can be pleased by pictures that please nobody else. What holds against that: crops, ``keep=`` (a loss
that keeps what the prompt said), ``noise_prior``, ``enough``, and, for the word, that one vector must serve many
noises. Whether it held is told by ``judges=``, which are in no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from ..descent import Descent, Example, Noise, Options, Variable
from ..descent.code import code_settings
from ..descent.measure import Measure
from ..descent.optimizers import OptimizerSpec, ScheduleSpec
from ..descent.randomness import seeded
from ..descent.subject import (
    describe_pipeline,
    describe_tensors,
    describe_value,
    make_examples,
    picture_size,
    sampler_call,
)
from ..errors import InputError, MissingGradientError
from ..losses import ClassTarget, Loss
from ..run import Run
from ..through import Through
from .embedding import Slots, without
from .expand_target import Given, classifier_of, counted, judges_of, pull_of
from .invert import EmbeddingVariable

Over = Literal["noise", "word"]
OWN = "the loss's own classifier"
PLAIN, AFTER = "the prompt alone", "after"
UNSEEN_PLAIN, UNSEEN_WORD = "unseen noise, the prompt alone", "unseen noise, with the word"
#: Pictures in a row of the page.
SHOWN = 12
#: Added to the seed for noise that the word has not been learnt from.
UNSEEN_SEED = 1_000_003


def expand(
    pipe: Any,
    prompt: str | Sequence[str],
    classifier: Given,
    target: str | int,
    *,
    over: Over = "noise",
    keep: Any = None,
    judges: Mapping[str, Any] | Sequence[str] | None = None,
    labels: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scale: float = 0.05,
    cutouts: int = 16,
    cut_power: float = 0.3,
    cut_least: float = 0.5,
    slots: Slots = "tokens",
    n_slots: int | None = None,
    placeholder: str | None = None,
    init: str | Tensor | None = None,
    unseen: int = 8,
    unseen_prompts: Sequence[str] | None = None,
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 31,
    guidance_scale: float | None = 7.5,
    steps: int = 30,
    seed: int = 0,
    optimizer: OptimizerSpec = "adamw",
    optimizer_kwargs: dict[str, Any] | None = None,
    lr: float | None = None,
    lr_schedule: ScheduleSpec = None,
    clip_grad: float | None = None,
    noise_prior: float = 0.0,
    patience: int | None = None,
    enough: float | None = None,
    minibatch: int | None = None,
    chunk: int | None = None,
    memory: str | int = "auto",
    clamp: bool = False,
    through: Through | str = "all",
    out: str | Path | None = None,
    resume: bool = True,
    checkpoint_every: int = 1,
    callback: Callable[[Run, dict[str, Any]], Any] | None = None,
    progress: bool = True,
    pipeline_kwargs: dict[str, Any] | None = None,
) -> Run:
    """Make pictures of a kind that ``classifier`` knows and the pipeline has no word for; or learn a word for it.

    Defaults are the paper's: 31 steps, 30 iterations, the class's cross-entropy × 0.05 over 16 crops, guidance 7.5.
    What is not named here is as in :func:`backdrift.optimize`.

    Args:
        prompt: what the sampler is told, one prompt or several. With ``over="word"`` the placeholder says where the
            word stands in it ("a red <kind> on white"); a prompt without it gets the word at its end.
        classifier: a :class:`~backdrift.losses.Classifier`; a module or callable from pictures (N, 3, H, W) to logits
            (N, K), prepared as ``labels``, ``size``, ``mean`` and ``std`` say; ``"kinds"`` (built in, of digits) or
            ``"digits"``; or a folder or hub id of an image classifier of transformers.
        target: the wanted class, by name or number.
        over: ``"noise"`` or ``"word"``.
        keep: a loss that keeps what the prompt said, added with its own weight: ``"0.1*clip"``, ``"0.05*class:seven"``.
        judges: who else is asked whether they see it, and has no part in the loss: ``{name: losses.ClassTarget(…)}`` or
            texts such as ``["class:seven"]``.
        labels: names of the K classes; needed for a target by name where the module has none.
        size: side in pixels that the module wants; default as the pictures (or crops) are.
        mean, std: normalisation of pictures in [0, 1], three numbers each; default none.
        scale: weight of the class's loss. Adam does not see the scale of a loss alone; it counts beside ``keep``,
            ``noise_prior`` and ``enough``.
        cutouts, cut_power, cut_least: number of crops (0: the picture as it is), the power that favours large ones, and
            the smallest side as a part of the picture's; see :class:`~backdrift.losses.Cutouts`.
        slots: of the word: ``"tokens"`` (rows of the input table, a file that diffusers' ``load_textual_inversion``
            reads) or ``"output"``; see :mod:`~backdrift.recipes.embedding`.
        n_slots: how many vectors the word has; default as many as ``init`` has tokens, or 1.
        placeholder: the word itself; default ``"<kind>"``.
        init: words to start from (``"tokens"``), or a tensor (n, width); default the mean of the table, or the padding.
            Best is the name of what the kind is a kind of, in its place: ``"a red <kind> on white"`` with
            ``init="one"`` begins with the pictures of "a red one on white", and the word is compared with these.
        unseen: how many further noises per unseen prompt the word is tried on; 0: none.
        unseen_prompts: prompts it is tried on; default the ones it was learnt on.
        batch_size: noises per prompt.
        guidance_scale: of classifier-free guidance; ``None``: the pipeline's own.
        lr: default 0.05 (noise), 0.1 × the root mean square of the input table (``"tokens"``), 0.1 (``"output"``).

    Returns:
        The run. Its table says in how many pictures the loss's classifier and the judges see the kind: with the prompt
        alone, and after. ``run.tensors("plain")`` and ``run.best.images`` are these pictures; for a word
        ``run.tensors("unseen")`` holds ``plain`` and ``word`` from unseen noise, and
        ``run.record["files"]["embedding"]`` its file.

    Raises:
        InputError: a setting cannot be used, or the classifier does not know the target.
        UnsupportedError: the pipeline cannot take the word.
        MissingGradientError: ``through`` cuts off the noise.
    """
    if over not in get_args(Over):
        raise InputError(f"over={over!r} must be 'noise' or 'word'.")
    wanted = ClassTarget(target, classifier_of(classifier, labels=labels, size=size, mean=mean, std=std))
    objective = pull_of(
        wanted, scale=scale, cutouts=cutouts, cut_power=cut_power, cut_least=cut_least, keep=keep
    )
    who = {OWN: wanted} | judges_of(judges)
    given = [prompt] if isinstance(prompt, str) else list(prompt)
    height, width = picture_size(pipe, height, width)
    call = sampler_call(pipe, height, width, num_inference_steps, guidance_scale, pipeline_kwargs)
    options = Options.among(locals())
    cut = options.choice.choose(num_inference_steps).cut
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size={batch_size!r} must be a whole number, at least 1.")
    if over == "noise":
        if cut:
            raise MissingGradientError(
                f"over='noise' with through={options.choice.spec!r}: the state is cut where step {cut} begins, so no "
                "gradient would reach the noise; All() keeps everything"
            )
        if minibatch is not None:
            raise InputError(
                "minibatch= is for over='word'; noises are optimised each by itself: use chunk=."
            )
        untold = {
            "init": init,
            "n_slots": n_slots,
            "placeholder": placeholder,
            "unseen_prompts": unseen_prompts,
        }
        if names := [f"{name}=" for name, value in untold.items() if value is not None]:
            raise InputError(f"{', '.join(names)} make a word: say over='word', or leave them out.")
        variable: Variable = Noise()
        more: dict[str, Any] = {}
    else:
        if noise_prior:
            raise InputError("noise_prior= is for over='noise'; a word is held by keep= and by many noises.")
        if slots not in get_args(Slots):
            raise InputError(f"slots={slots!r} must be 'output' or 'tokens'.")
        if isinstance(unseen, bool) or not isinstance(unseen, int) or unseen < 0:
            raise InputError(f"unseen={unseen!r} must be a whole number, at least 0.")
        variable = EmbeddingVariable(slots, n_slots, placeholder or "<kind>", init)
        variable.prepare(pipe, [*given, *(unseen_prompts or ())])
        more = {"unseen": unseen, "unseen_prompts": list(unseen_prompts or given)}
    task = Task(pipe, variable, options, objective, {OWN: wanted} | judges_of(judges))
    examples = task.examples([p for p in given for _ in range(batch_size)], height, width, seed)
    settings = options.settings(variable) | {
        "over": over,
        "loss": objective.spec,
        "loss_tensors": describe_tensors(objective),
        "classifier": describe_value([wanted.classifier.labels, wanted.classifier.size, target]),
        "judges": {name: judge.spec for name, judge in task.who.items() if name != OWN},
        "batch_size": batch_size,
        "pipeline": describe_pipeline(pipe),
        **code_settings(objective, None),
        **more,
    }
    run = Run.open(
        "expand", settings, title=f"a {over} for {target!r}: {given[0]}",
        prompt=[e.prompt for e in examples], seed=seed, out=out, resume=resume,
        device=getattr(pipe, "_execution_device", None),
    )  # fmt: skip
    Descent(
        pipe, variable, examples, task.score, options, run, callback=callback, progress=progress,
        judge=lambda images: counted(task.who, images, AFTER), scorer=objective,
    ).go()  # fmt: skip
    if "plain" not in run.record["tensors"]:
        others = [p for p in more.get("unseen_prompts", ()) for _ in range(unseen)]
        with run.writing():
            task.look(
                run, examples, task.examples(others, height, width, seed + UNSEEN_SEED) if others else []
            )
    return run


class Task:
    """What is made, how it is scored, and who says what is in it.

    Args:
        who: the loss's own classifier and the judges, by name.
    """

    def __init__(
        self, pipe: Any, variable: Variable, options: Options, objective: Loss, who: Mapping[str, ClassTarget]
    ) -> None:
        self.pipe, self.variable, self.options, self.objective, self.who = (
            pipe, variable, options, objective, who,
        )  # fmt: skip

    def plainly(self, prompt: str) -> str:
        """The prompt without the new word; where the word stood, the words it started from."""
        word = self.variable
        if not isinstance(word, EmbeddingVariable):
            return prompt
        if isinstance(word.init, str):
            return prompt.replace(word.placeholder, word.init)
        return without(prompt, word.placeholder)

    def examples(self, prompts: Sequence[str], height: int, width: int, seed: int) -> list[Example]:
        """One per prompt; their number of tokens is checked without the new word, which counts for itself."""
        drawn = make_examples(self.pipe, [self.plainly(p) for p in prompts], height, width, seed)
        return [Example(prompt, e.noise) for prompt, e in zip(prompts, drawn, strict=True)]

    def score(self, images: Tensor, chosen: Sequence[Example]) -> Tensor:
        """The loss (n,); what it is told of the prompts does not hold the word."""
        return self.objective(images, [self.plainly(e.prompt) for e in chosen])

    def look(self, run: Run, examples: Sequence[Example], unseen: Sequence[Example]) -> None:
        """Pictures of the prompt alone, and of the word on unseen noise: counted, saved and shown."""
        nothing, figures = Variable(), run.record["figures"]
        plain = self._made(run, nothing, examples, "before", "the prompt alone")
        figures |= counted(self.who, plain, PLAIN)
        if unseen:
            self.variable.parameters = dict(run.tensors("best"))
            before = self._made(run, nothing, unseen, "unseen noise", "unseen noise: the prompt alone")
            after = self._made(
                run, self.variable, unseen, "unseen noise, the word", "the same noise, with the word"
            )
            figures |= counted(self.who, before, UNSEEN_PLAIN) | counted(self.who, after, UNSEEN_WORD)
            run.save_tensors("unseen", {"plain": before, "word": after})
        after = run.record["pictures"]["after"]
        show(
            run,
            "after",
            run.best.images,
            after["caption"].partition(" (the first")[0],
            flagged="flagged" in after,
        )
        run.save_tensors("plain", {"images": plain})
        run.finish(run.record["status"], run.record["message"])

    def _made(self, run: Run, how: Variable, which: Sequence[Example], name: str, caption: str) -> Tensor:
        if not isinstance(how, EmbeddingVariable):
            which = [Example(self.plainly(e.prompt), e.noise) for e in which]
        measure = Measure(self.pipe, how, self.options, self.objective, run.record["stats"])
        with seeded(self.options.seed, name):
            found = measure(which, range(len(which)), self.score, gradient=False)
        show(run, name, found.images, caption, flagged=bool(found.flagged.any()))
        return found.images


def show(run: Run, name: str, images: Tensor, caption: str, *, flagged: bool) -> None:
    """A row of the page: at most :data:`SHOWN` of the pictures, so that they can be seen."""
    more = f" (the first {SHOWN} of {len(images)})" if len(images) > SHOWN else ""
    run.save_picture(name, images[:SHOWN], caption + more, flagged=flagged)
