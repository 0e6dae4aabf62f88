//! The CRI runtime whose pod sandboxes are CTs: CRI service, host service, streaming server.
