"""A frozen generator that starts in seconds: a packaged tiny model behind the part of OpenAI's API that clients use.

python -m tests.integration.generator_server --model FOLDER --port 8000
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from verl.agent.protocols import Sampling
from verl.workers.engines import EngineConfig, RolloutEngine, create_engine

MODEL = "generator"
MAX_MODEL_LEN = 1024


class ChatRequest(BaseModel):
    """What a client asks."""

    model: str
    messages: list[dict[str, str]]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Server:
    """Answers conversations with one engine."""

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase

    def health(self) -> dict[str, str]:
        """Say that the model is loaded."""
        return {"status": "ok"}

    def models(self) -> dict[str, object]:
        """List the one model."""
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": MAX_MODEL_LEN}]}

    async def chat(self, request: ChatRequest) -> dict[str, object]:
        """Continue a conversation."""
        prompt = self.tokenizer.apply_chat_template(request.messages, add_generation_prompt=True, return_dict=False)
        sampling = Sampling(request.temperature, request.top_p, max_tokens=request.max_tokens, seed=request.seed)
        reply = await self.engine.generate(prompt, sampling)
        message = {"role": "assistant", "content": reply.text}
        return {
            "id": "chat",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": reply.finish}],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(reply.ids),
                "total_tokens": len(prompt) + len(reply.ids),
            },
        }


def create_app(server: Server) -> FastAPI:
    """Put the server behind its paths."""
    app = FastAPI()
    app.get("/health")(server.health)
    app.get("/v1/models")(server.models)
    app.post("/v1/chat/completions")(server.chat)
    return app


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = create_engine(EngineConfig(options.model, kind="hf", dtype="float32", max_model_len=MAX_MODEL_LEN))
    server = Server(engine, AutoTokenizer.from_pretrained(options.model))
    uvicorn.run(create_app(server), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
