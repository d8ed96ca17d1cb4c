"""Leave an answer early: its KV blocks are free again at once. Usage: abort.py [HOST:PORT]"""

import sys
import time

from twinpool import Client

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"


def show(client: Client, when: str) -> None:
    status = client.status()
    print(f"{when}: {status.requests.running} running, {status.requests.aborted} aborted")
    for instance in status.instances:
        print(f"  {instance.role} {instance.name}: {instance.blocks}")


with Client(address) as client:
    show(client, "before")
    for chunk in client.generate("Count for ever: 1 2 3", max_new_tokens=400, ignore_eos=True):
        print(f"first text {chunk.text!r} of request {chunk.request_id}; that is enough")
        show(client, "while it runs")
        break
    time.sleep(2.0)  # instances report their blocks once a second
    show(client, "after")
