"""What all JSON documents of the command line share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Data(BaseModel):
    """A part of a document."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Document(Data):
    """A whole document."""

    schema_version: Literal[1]
