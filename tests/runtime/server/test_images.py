"""Images over HTTP: data URLs alone, and what every other thing is told."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_aot.runtime.generation.generator import Generator
from tests.runtime.server.servers import application, asgi_client
from tests.vl_checkpoints import SeeingModel, noise, png

FILE = png(noise(90, 130, 1))
URL = f"data:image/png;base64,{base64.b64encode(FILE).decode()}"
