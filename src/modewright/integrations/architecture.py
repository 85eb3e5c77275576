# SPDX-License-Identifier: Apache-2.0
"""Which class of Transformers a folder's model is of, by what its config says."""

from __future__ import annotations

from typing import Any

from modewright.errors import DataError
from modewright.integrations.model_folder import transformers_package

_KINDS = {
    # name of the class that picks one, of its table
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}


def auto_class(config: Any) -> Any:
    """Return the ``Auto...`` class that makes what a config names under ``architectures``.

    Args:
        config: A config of Transformers. If it names no architecture, that is the language model
            of its kind, or the bare network if there is none.

    Raises:
        DataError: It names something that takes more than tokens, or that is not known.
    """
    hf = transformers_package()
    known: dict[str, str] = {}
    for kind, table in _KINDS.items():
        for name in _class_names(getattr(hf, table), config):
            known.setdefault(name, kind)
    named = getattr(config, "architectures", None) or list(known)[:1]
    if named and named[0] in known:
        return getattr(hf, known[named[0]])
    raise DataError(
        f"The config names the architecture {named[0] if named else None!r}. Of the kind "
        f"{config.model_type!r} models of these classes can be loaded: "
        f"{', '.join(known) or 'none'}. Load another one in Python, and pass it as a module."
    )


def _class_names(table: Any, config: Any) -> list[str]:
    if type(config) not in table:
        return []
    found = table[type(config)]
    return [one.__name__ for one in (found if isinstance(found, (tuple, list)) else (found,))]
