"""gRPC channel and server settings that both ends of a connection have to agree on."""

# A prompt of a million tokens is 4 MB of ids and 1 MB of hashes; a transfer frame is about 1 MiB, but one
# layer of one page of a large model may be more.
MAX_MESSAGE_BYTES = 64 << 20

# A peer whose machine vanished closes nothing: pings find it.
KEEPALIVE_INTERVAL_MS = 5_000
KEEPALIVE_TIMEOUT_MS = 5_000

_COMMON = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # The time that counts: gRPC waits for this, a minute by default, and never for the one above
    # (https://github.com/grpc/grpc/pull/39239).
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A stream's window before gRPC has measured the connection; the default, 64 KiB, would stop a frame of
    # a transfer sixteen times.
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.http2.max_frame_size", 1 << 20),
)

CHANNEL_OPTIONS = (
    *_COMMON,
    # A worker that comes back is to be found within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Channels to one address would share one connection, and its flow control, by default.
    ("grpc.use_local_subchannel_pool", 1),
    # Workers are named by address; a proxy from the environment has no business between them.
    ("grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS = (
    *_COMMON,
    # Without it two servers bind one port, and each gets half of the connections.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_INTERVAL_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
)
