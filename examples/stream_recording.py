"""Stream a recording, and show what is understood of it while it is being spoken.

python examples/stream_recording.py [FILE]
"""

import asyncio
import sys
from pathlib import Path

from speechrnt import OptimizedSTTFactory, load_audio
from speechrnt.events import Final, Partial

SAMPLE = Path(__file__).parent.parent / "tests" / "samples" / "s27_en.wav"


async def main():
    """Push the recording as it would be spoken."""
    audio = load_audio(sys.argv[1] if len(sys.argv) > 1 else SAMPLE)
    with OptimizedSTTFactory.create_optimized() as stt:
        async with stt.stream(language="en") as stream:
            reader = asyncio.create_task(show(stream))
            for start in range(0, len(audio.samples), 1600):
                await stream.apush(audio.samples[start : start + 1600])
                await asyncio.sleep(0.1)
        await reader


async def show(stream):
    """Print the events of a stream."""
    async for event in stream:
        if isinstance(event, Partial):
            print(f"  {event.stable_text} | {event.unstable_text}")
        elif isinstance(event, Final):
            print(event.text)


if __name__ == "__main__":
    asyncio.run(main())
