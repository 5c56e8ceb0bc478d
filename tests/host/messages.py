"""What ComfyUI tells a page over its websocket while a graph runs."""

import asyncio
import json
import struct
import threading
import uuid
from contextlib import contextmanager, suppress

PREVIEW, TEXT, PREVIEW_OF_NODE = 1, 3, 4


class Messages:
    """Of one client, in the order they came. bars: [(node, value, max)]; texts: [(node, text)]; pictures: how
    many previews came."""

    def __init__(self):
        self.client, self.bars, self.texts, self.pictures = uuid.uuid4().hex, [], [], 0

    def take(self, data: str | bytes):
        """One message, as it came."""
        if isinstance(data, str):
            message = json.loads(data)
            if message["type"] == "progress_state":
                for name, node in message["data"]["nodes"].items():
                    if node["state"] == "running":
                        self.bars.append((name, node["value"], node["max"]))
            return
        (kind,) = struct.unpack(">I", data[:4])
        if kind in (PREVIEW, PREVIEW_OF_NODE):
            self.pictures += 1
        elif kind == TEXT:
            (length,) = struct.unpack(">I", data[4:8])
            self.texts.append((data[8 : 8 + length].decode(), data[8 + length :].decode()))

    def of(self, node: str) -> str:
        """All texts of a node, one after the other."""
        return "\n".join(text for name, text in self.texts if name == node)


@contextmanager
def listening(server):
    """The Messages of a client of a running `Server`; graphs are submitted with its id."""
    from aiohttp import ClientSession, WSMsgType

    found, ready, loop = Messages(), threading.Event(), asyncio.new_event_loop()

    async def listen():
        url = f"{server.url.replace('http', 'ws')}/ws?clientId={found.client}"
        async with ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            flags = {"supports_preview_metadata": True}
            await socket.send_json({"type": "feature_flags", "data": flags})
            ready.set()
            async for message in socket:
                if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                    found.take(message.data)

    task = loop.create_task(listen())

    def turn():
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
