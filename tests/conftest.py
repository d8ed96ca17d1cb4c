"""Settings that must be in place before any test imports torch."""

from service.threads import set_thread_env

set_thread_env(1)
