//! Remote command and port forwarding as Kubernetes speaks them: SPDY/3.1 and WebSocket framing.
