"""The whole study of MiniLM: first what each way of pruning keeps, then what the finished models take and how fast."""

from __future__ import annotations

from pathlib import Path

from offpath.studies.compression.arms import Arms, StudyStopped, Watch
from offpath.studies.compression.config import StudyConfig
from offpath.studies.compression.folder import StudyFolder
from offpath.studies.compression.pretrained import find, need_transformers
from offpath.studies.compression.result import StudyResult
from offpath.studies.compression.texts import study_texts
from offpath.studies.compression.versions import Versions
from offpath.studies.files import write_text
from offpath.studies.folder import RunFolder
from offpath.studies.interrupt import stop_on_signal

RESULT = "minilm.json"


def study(config: StudyConfig, out: Path, data: Path | None, watch: Watch) -> StudyResult:
    """Run what is left of `config` in the folder `out` and return all that is there then; `data` is where pairs are.

    `watch(what, done, total)` is called along the way. Ctrl-C stops it after a step, and the same call goes on; a kill
    loses half a minute at most. Raises `RunError` or `DataError`.
    """
    need_transformers()
    find(config.model)
    texts = study_texts(config, data)
    folder = StudyFolder(out)
    with RunFolder(out).locked():
        folder.settle(config)
        with stop_on_signal() as stop:
            arms = Arms(config, folder, texts, watch, stop)
            try:
                arms.run()
                Versions(arms).run()
            except StudyStopped:
                pass
        result = StudyResult.collect(folder, {name: pairs.source for name, pairs in texts.tests.items()})
        write_text(out / RESULT, result.to_text())
    return result
