"""`python shared_httpx.py URL PROMPTS OUT SLOTS [KEPT]`: the usual way, a task for each row, one shared httpx client.

KEPT connections stay open between requests; httpx's own default is 20, and what is more is opened anew each time.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx


async def main(url: str, prompts: Path, out: Path, slots: int, kept: int) -> None:
    """Ask for every row and append each answer as it comes; nothing is checked."""
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").split("\n") if line]
    free = asyncio.Semaphore(slots)
    with out.open("a", encoding="utf-8") as file:
        limits = httpx.Limits(max_connections=100, max_keepalive_connections=kept)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

            async def ask(row: dict[str, Any]) -> None:
                async with free:
                    response = await client.post(
                        "/api/chat",
                        json={
                            "model": "teacher",
                            "messages": row["messages"],
                            "stream": False,
                            "options": {"temperature": 0.3, "top_p": 0.9, "seed": 42},
                        },
                    )
                    response.raise_for_status()
                    answer = response.json()["message"]
                messages = [*row["messages"], answer]
                file.write(json.dumps(row | {"messages": messages}, ensure_ascii=False) + "\n")
                file.flush()

            await asyncio.gather(*map(ask, rows))


if __name__ == "__main__":
    slots, kept, *_ = [*map(int, sys.argv[4:]), 20]
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), slots, kept))
