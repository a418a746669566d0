# What BuildPaths is asked for, by name. Everything needs only a static busybox as C</bin/sh>.

let
  make = name: script: more:
    derivation ({
      inherit name;
      system = "x86_64-linux";
      builder = "/bin/sh";
      args = [ "-ec" script ];
    } // more);

  fixed = name: contents: script:
    make name script {
      outputHashAlgo = "sha256";
      outputHashMode = "flat";
      outputHash = builtins.hashString "sha256" contents;
    };

  below = name: make name "echo ${name}; echo ${name} > $out" { };
  needs = name: inputs: make name "echo ${name} $inputs > $out" { inherit inputs; };

  failing = make "failing" "echo it fails >&2; exit 3" { };
  alsoFailing = make "also-failing" "exit 4" { };
  mismatch = fixed "mismatch" "expected" "printf other > $out";
in
rec {
  simple = below "simple";
  tree = needs "tree" [ (needs "left" [ (below "deep") (below "deeper") ]) (needs "right" [ (below "deep") ]) ];
  multi = make "multi" "echo out > $out; echo dev > $dev; echo $dev > $doc" { outputs = [ "out" "dev" "doc" ]; };
  onDev = needs "on-dev" [ multi.dev ];
  inherit failing alsoFailing mismatch;
  afterFailing = needs "after-failing" [ failing ];
  afterBoth = needs "after-both" [ failing alsoFailing ];
  afterAfter = needs "after-after" [ afterFailing ];
  afterMismatch = needs "after-mismatch" [ mismatch ];
  fetch = fixed "fetch" "contents" "exit 7";
  silent = make "silent" "echo begun; sleep 100" { };
  endless = make "endless" "while :; do echo alive; sleep 0.3; done" { };
  chatty = make "chatty" "printf %01500d 0; sleep 100" { };
  foreign = make "foreign" ":" { system = "sparc-plan9"; };
  demanding = make "demanding" ":" { requiredSystemFeatures = [ "bar" ]; };
  noOutput = make "no-output" ":" { };
  checked = make "checked" "echo $out > $out" { allowedReferences = [ ]; };
}
