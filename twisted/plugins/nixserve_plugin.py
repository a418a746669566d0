from twisted.application.service import ServiceMaker

nixserve = ServiceMaker(
    "nixserve",
    "nixserve.app.service",
    "A Nix store over SSH: the protocol of nix-store --serve",
    "nixserve",
)
