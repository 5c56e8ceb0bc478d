"""What the server's process holds, by its own books: bytes in glibc's allocations and blocks in Python's.

RssAnon also has what the allocator keeps for later: while 216.4 MiB were in use after each /free of 104
graphs, it went from 627 to 685 MiB and back.
"""

import ctypes
import gc
import sys

from aiohttp import web
from server import PromptServer

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


@PromptServer.instance.routes.get("/test/heap")
async def heap(request):
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    found = mallinfo2()
    return web.json_response({"allocated": found.uordblks + found.hblkhd, "blocks": sys.getallocatedblocks()})
