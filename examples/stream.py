"""Print an answer as it comes, and what it cost. Usage: stream.py [HOST:PORT]"""

import sys

from twinpool import Client

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"

prompt = "the code of river is 4821; the code of stone is 1034; what is the code of river?"

with Client(address) as client:
    for chunk in client.generate(prompt, max_new_tokens=64, temperature=0.3, seed=1):
        print(chunk.text, end="", flush=True)
        if chunk.usage and chunk.stats:
            print(f"\n\n{chunk.usage}\n{chunk.stats}")
