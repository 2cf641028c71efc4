"""Resume TLS sessions: a further connection to a host costs it and us a fraction of the first handshake."""

import ssl
from collections import OrderedDict
from functools import cache
from typing import Any, cast

MOST_HOSTS = 256


class _Connection(ssl.SSLObject):
    """A connection that its context remembers once its handshake is done, with all checks."""

    def do_handshake(self) -> None:
        super().do_handshake()
        cast(ResumingContext, self.context).remember(self)


class ResumingContext(ssl.SSLContext):
    """The default context of a client, which continues the session of the last connection to the same host."""

    sslobject_class = _Connection

    def __init__(self, *_: object) -> None:
        usual = ssl.create_default_context()
        self.verify_flags, self.options = usual.verify_flags, usual.options
        self.load_default_certs()
        self.set_alpn_protocols(["http/1.1"])
        self._last: OrderedDict[str, ssl.SSLObject] = OrderedDict()

    def remember(self, connection: ssl.SSLObject) -> None:
        """Keep a connection for its session, whose tickets may come later."""
        host = connection.server_hostname or ""
        self._last[host] = connection
        self._last.move_to_end(host)
        if len(self._last) > MOST_HOSTS:
            self._last.popitem(last=False)

    def wrap_bio(self, incoming: Any, outgoing: Any, *args: Any, **options: Any) -> ssl.SSLObject:
        """Begin a connection, as the base class."""
        last = self._last.get(options.get("server_hostname") or "")
        if last is not None and last.session is not None and last.session.has_ticket:
            options["session"] = last.session
        return super().wrap_bio(incoming, outgoing, *args, **options)


@cache
def resuming_context() -> ResumingContext:
    """Return the context of this process."""
    return ResumingContext(ssl.PROTOCOL_TLS_CLIENT)
