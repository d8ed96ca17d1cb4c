"""Print an answer as it comes, and what it cost. Usage: stream.py [HOST:PORT]"""

import sys

from twinpool import Client

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"

with Client(address) as client:
    for chunk in client.generate("Once upon a time", max_new_tokens=64, temperature=0.8, seed=1):
        print(chunk.text, end="", flush=True)
        if chunk.usage and chunk.stats:
            print(f"\n\n{chunk.usage}\n{chunk.stats}")
