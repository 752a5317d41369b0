"""A run: one folder that is written as the work goes, and can be taken up again after a kill.

The folder
==========
::

    record.json              everything below, rewritten after every iteration
    pictures/*.png           what to look at
    tensors/*.safetensors    what was found (the best so far)
    checkpoint.pt            what a restart needs; read with ``weights_only=True``
    report.html              drawn from record.json and pictures/ by ``backdrift.report.write(folder)``

Every file is written beside its place and renamed into it, so a kill at any moment leaves the old or the
new file, never half of one.

The record (``record.json``, UTF-8, no NaN: an unknown number is ``null``)
==========================================================================
========================  ============================================================================
``format``                ``"backdrift-run/1"``
``kind``                  ``"optimize"``, ``"invert"``, ``"ambigram"``, …: which verb wrote it
``title``                 one line for people, e.g. ``"optimize noise: a red seven"``
``status``                ``"running"``, ``"finished"``, ``"stopped early"``, ``"interrupted"`` or
                          ``"failed"``
``message``               one line: why it stopped early or failed; else ``""``
``created``, ``updated``  UTC times, ISO 8601
``prompt``                list of strings, one per example
``seed``                  integer
``settings``              {name: JSON value}: every setting that the result depends on, and ``memory``
``fingerprint``           SHA-256 over the settings that the result depends on
``versions``              {package: version}
``machine``               {``platform``, ``device``, ``threads``}
``iterations``            list, in order, of objects with
                          ``iteration`` (0 is before any update; the last one is measured, not updated),
                          ``loss`` (mean over samples, without the prior),
                          ``per_sample`` (list of losses), ``examples`` (their indices),
                          ``grad_norm`` (before clipping; ``null`` where no gradient was taken),
                          ``lr``, ``seconds``, and where asked for ``prior`` and ``heldout``;
                          ``through`` (the sampler's steps that were drawn) where they are drawn at random;
                          ``"exploding": true`` where the gradient grew beyond measure on its way
``best``                  ``null`` or {``iteration``, ``loss``, ``heldout`` (or ``null``)}, and for
                          independent samples ``per_sample``: list of {``iteration``, ``loss``}
``pictures``              {name: {``path``, ``caption``}}, in the order in which to show them; ``path``
                          is relative to the folder. Usual names: ``before``, ``target``, ``after``.
                          ``"flagged": true`` where the pipeline's safety checker flagged a picture of it
``tensors``               {name: {``path``, ``shapes``: {tensor name: [sizes]}}}
``files``                 {name: {``path``, ``caption``}}: other things to take away (an embedding, a LoRA)
``trace``                 ``null`` or the last gradient's way through the sampler's N steps: {``iteration``,
                          ``through``, ``steps`` (that carried it), ``latents`` (N + 1 norms), ``eps`` (N
                          norms), ``growth`` (N ratios), ``clipped``, ``exploding``}
``stats``                 {``network_calls``, ``redone``, ``vjps``, ``peak_bytes``, ``seconds``}: sums over
                          the run (``peak_bytes``: the maximum); a figure that is not known is ``null``
``figures``               {name: number or string}: the table of results to print
``variants``              of runs that go several ways to the same end (``guide-…``): {name: what this way gave and
                          cost}: ``n``, ``attempts`` (per step), ``steps`` (one object per guided step), ``scores``
                          ({name: one number per sample}), ``seconds``, ``network_calls``, ``redone``, ``vjps``,
                          ``decodes``, ``flagged``
``comparison``            of the same: {``scores``: [{``name``, ``lower``}], ``rows``: [{``name``, ``scores``, costs}],
                          ``note``}, the table to show
``one_step``              of the same: measured tries of one-step guidance for each of n-step guidance's
``curves``                of the same: {``label``, ``across``, ``note``, ``lines``: [{``name``, ``style``, ``points``}]}
                          (and ``title`` where it is not the loss along the steps)
``audit``                 of audits: {``filter``, ``samples``, ``searches``: [{``tau``, ``way``, ``tensors``,
                          ``samples``}], ``rates``, ``hardening``}
``tables``                further tables of the page: [{``title``, ``columns``, ``rows``, ``note``}]
========================  ============================================================================
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import nests
from .errors import InputError
from .files import locked, write_atomically
from .pictures import in_rows, to_pil
from .record import (
    FORMAT,
    NOT_DECISIVE,
    difference,
    fingerprint,
    finite,
    machine,
    new_record,
    nothing_done,
    now,
    versions,
)

__all__ = ["Best", "Run", "fingerprint", "versions"]

_NEEDED = {
    "kind",
    "prompt",
    "seed",
    "settings",
    "fingerprint",
    "status",
    "iterations",
    "best",
    "pictures",
    "tensors",
}


@dataclass(frozen=True)
class Best:
    """The best of a run.

    Attributes:
        images: pictures, float tensor (N, 3, H, W) meant for [0, 1], not clamped.
        tensors: what was optimised, by name (``"noise"``, ``"prompt_embeds"``, ``"unet.conv_in.weight"``, …).
        loss: the mean loss, without the prior.
        iteration: the iteration it was reached in (for independent samples: the last improvement of any).
    """

    images: Tensor
    tensors: dict[str, Tensor]
    loss: float
    iteration: int

    @property
    def pil(self) -> list[Any]:
        """The pictures as PIL images, clamped to [0, 1]."""
        return [to_pil(image) for image in self.images]


class Run:
    """One run's folder; see the module's docstring for its files and for the format of the record.

    Attributes:
        folder: where everything is.
        record: the record, as in ``record.json``.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder, self.record = folder, record

    @classmethod
    def open(
        cls,
        kind: str,
        settings: Mapping[str, Any],
        *,
        title: str,
        prompt: list[str],
        seed: int,
        out: str | Path | None,
        resume: bool = True,
        unfingerprinted: tuple[str, ...] = NOT_DECISIVE,
        device: torch.device | None = None,
    ) -> Run:
        """Begin a run in ``out``, or take up the one that is there if its settings are the same.

        Args:
            settings: JSON values. Those named in ``unfingerprinted`` may differ between a run and its
                continuation, because the result does not depend on them.
            out: the folder; ``None`` stands for ``runs/<kind>-<first digits of the fingerprint>``.
            resume: ``False`` refuses a folder that already holds a run.
            device: where the work is done, for the record; the CPU if None.

        Raises:
            InputError: the folder holds another configuration's run, or something that is not a run.
                Nothing in it has been touched then.
        """
        fixed = {"kind": kind, "prompt": prompt, "seed": seed} | dict(settings)
        mark = fingerprint({k: v for k, v in fixed.items() if k not in unfingerprinted})
        folder = Path(out) if out is not None else Path("runs") / f"{kind}-{mark[:10]}"
        record = new_record(
            kind, settings, title=title, prompt=prompt, seed=seed, mark=mark, machine=machine(device)
        )
        if folder.exists():
            earlier = cls._earlier(folder, record, resume)
            if earlier is not None:
                return earlier
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, record)

    @classmethod
    def _earlier(cls, folder: Path, record: dict[str, Any], resume: bool) -> Run | None:
        """The run in ``folder`` if it may be continued; ``None`` for an empty folder."""
        if not folder.is_dir():
            raise InputError(f"out={str(folder)!r} is a file; give the name of a folder.")
        if not (folder / "record.json").exists():
            if any(p.name != ".lock" for p in folder.iterdir()):
                raise InputError(
                    f"out={str(folder)!r} holds other files and no run; give a new or an empty folder."
                )
            return None
        old = cls.load(folder)
        if not resume:
            raise InputError(f"{str(folder)!r} already holds a run and resume=False; give another folder.")
        if old.record["fingerprint"] != record["fingerprint"]:
            done = any(old.record.get(name) for name in ("best", "variants", "audit"))
            if not old.finished and not done:
                return None  # it failed before it had measured anything: there is nothing to lose
            raise InputError(
                f"{str(folder)!r} holds a run with other settings ({difference(old.record, record)}). It was left "
                "as it is. Give another folder, or the same settings to continue it."
            )
        old.record |= {"versions": record["versions"], "machine": record["machine"]}
        return old

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run back, to look at.

        Raises:
            InputError: there is no readable record of a known format.
        """
        path = Path(folder) / "record.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # neither text nor JSON
            raise InputError(f"{str(path)!r} is not a readable run record: {error}.") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise InputError(f"{str(path)!r} is not a run record of the format {FORMAT!r}.")
        if lost := sorted(_NEEDED - record.keys()):
            raise InputError(
                f"{str(path)!r} is a run record without {', '.join(lost)}; delete the folder to start anew."
            )
        return cls(Path(folder), record)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end (all its iterations, or an early stop)."""
        return self.record["status"] in ("finished", "stopped early")

    @property
    def report(self) -> Path:
        """The run's page, ``report.html``, drawn anew from the record."""
        # The report's room reads records and knows nothing of runs, hence the import by name.
        return Path(importlib.import_module("backdrift.report").write(self.folder))

    @property
    def best(self) -> Best:
        """The best pictures and tensors so far.

        Raises:
            InputError: the run has not measured anything yet.
        """
        if self.record["best"] is None:
            raise InputError(f"The run in {str(self.folder)!r} has measured nothing yet.")
        tensors = self.tensors("best")
        return Best(
            images=self.tensors("best_images")["images"],
            tensors=tensors,
            loss=self.record["best"]["loss"],
            iteration=self.record["best"]["iteration"],
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under ``name``.

        Raises:
            InputError: there are none, or their file cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if name not in self.record["tensors"]:
            raise InputError(f"The run has no tensors {name!r}; it has {sorted(self.record['tensors'])}.")
        path = self.folder / self.record["tensors"][name]["path"]
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{str(path)!r} cannot be read ({error}); delete the folder to make the run anew."
            ) from error

    def clear(self) -> None:
        """Forget the results in the record, to begin anew with the same settings."""
        self.record |= nothing_done() | {"status": "running", "message": ""}
        self.save_record()

    def save_record(self) -> None:
        """Write ``record.json``."""
        self.record["updated"] = now()
        text = json.dumps(finite(self.record), ensure_ascii=False, indent=1, allow_nan=False)
        write_atomically(self.folder / "record.json", lambda f: f.write(text.encode()), durable=True)

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write ``tensors/<name>.safetensors`` and enter it in the record."""
        from safetensors.torch import save

        flat = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        path = f"tensors/{name}.safetensors"
        data = save(flat, metadata={"fingerprint": self.record["fingerprint"]})
        write_atomically(self.folder / path, lambda f: f.write(data))
        self.record["tensors"][name] = {"path": path, "shapes": {k: list(v.shape) for k, v in flat.items()}}

    def save_picture(self, name: str, images: Tensor, caption: str, *, flagged: bool = False) -> None:
        """Write ``pictures/<name>.png`` and enter it in the record.

        Args:
            images: (3, H, W) or (N, 3, H, W) in [0, 1]; clamped. Several become rows of twelve.
            flagged: whether a safety checker flagged any of them; the page blurs the row then.
        """
        path = f"pictures/{name.replace(' ', '-')}.png"
        row = to_pil(in_rows(images if images.ndim == 4 else images[None]))
        write_atomically(self.folder / path, lambda f: row.save(f, format="PNG"))
        more = {"flagged": True} if flagged else {}
        self.record["pictures"][name] = {"path": path, "caption": caption, **more}

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write all that a restart needs, in one file so that it is never half of one iteration."""
        at_home = nests.transform(
            lambda x: x.detach().cpu(), state
        )  # it may be read where there is no such device
        content = {"state": at_home, "record": json.dumps(finite(self.record))}
        write_atomically(self.folder / "checkpoint.pt", lambda f: torch.save(content, f), durable=True)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint's state, or ``None``; the record goes back to that moment.

        Raises:
            InputError: the file cannot be read.
        """
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            record, state = json.loads(content["record"]), content["state"]
        except Exception as error:
            raise InputError(
                f"{str(path)!r} cannot be read ({error}); delete the folder to start anew."
            ) from error
        if record["fingerprint"] != self.record["fingerprint"]:
            raise InputError(f"{str(path)!r} belongs to another run; delete the folder to start anew.")
        self.record = record | {"versions": self.record["versions"], "status": "running", "message": ""}
        return state

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder against other processes, and write down how the work ended if it fails.

        Raises:
            InputError: another process is writing to the folder.
        """
        with locked(self.folder):
            try:
                yield
            except BaseException as error:
                with suppress(OSError):  # a full disk must not hide the first error
                    self.record["status"] = (
                        "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                    )
                    self.record["message"] = f"{type(error).__name__}: {error}"
                    self.save_record()
                raise

    def finish(self, status: str = "finished", message: str = "") -> None:
        """Write the final record and the page, and drop the checkpoint, which nothing needs any more."""
        self.record["status"], self.record["message"] = status, message
        self.save_record()
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        _ = self.report
