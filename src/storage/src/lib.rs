//! Container roots and layers on disk: the storage contract and its drivers.
