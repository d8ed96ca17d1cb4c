"""What can go wrong, and what to do about each. Usage: errors.py [HOST:PORT]"""

import sys
import time

from twinpool import (
    Client,
    Completion,
    DeadlineExceeded,
    GenerateOptions,
    InvalidRequest,
    Refused,
    Unavailable,
)

ATTEMPTS = 5


def complete(client: Client, prompt: str, options: GenerateOptions) -> Completion:
    """Complete, and try again where the server says that this can help."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return client.complete(prompt, **options)
        except (Refused, Unavailable) as error:
            if error.retry_after_s is None or attempt == ATTEMPTS:
                raise
            print(f"attempt {attempt}: {error}")
            time.sleep(error.retry_after_s)
    raise AssertionError("the last attempt returns or raises")


def main(address: str) -> None:
    with Client(address) as client:
        print("a good request:", repr(complete(client, "Hello", {"max_new_tokens": 8}).text))
        try:
            complete(client, "Hello", {"top_p": 7.0})
        except InvalidRequest as error:
            print("invalid:", error.field, "-", error)
        try:
            complete(client, "Hello", {"max_new_tokens": 500, "timeout_s": 0.01})
        except DeadlineExceeded as error:
            print("too late:", error)
        try:
            complete(client, "Hello", {"max_new_tokens": 10**9})
        except (InvalidRequest, Refused) as error:
            print("more than there will ever be:", error)
    try:
        with Client("127.0.0.1:1") as nobody:
            complete(nobody, "Hello", {})
    except Unavailable as error:
        print("unreachable:", error)


main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000")
