"""Who may call a port, and how two processes know each other: TLS, tokens, rights.

Owns certificates, secrets and who may do what; knows nothing of requests. The KV data network is
`kvtransfer`'s and is not protected by what is here.
"""
