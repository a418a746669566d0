# What is built remotely, by name. Everything needs only a static busybox as C</bin/sh>.

let
  make = name: script: more:
    derivation ({
      inherit name;
      system = "x86_64-linux";
      builder = "/bin/sh";
      args = [ "-ec" script ];
    } // more);

  floating = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  text = builtins.toFile "text" "see ${builtins.toFile "other" "nothing"}";
  needs = name: inputs: make name "echo ${name} $inputs > $out" { inherit inputs; };
in
rec {
  multi = make "multi" "mkdir $out; echo said; echo text > $dev; ln -s $dev $out/dev; echo $out > $out/self" {
    outputs = [ "out" "dev" ];
  };
  user = make "user" "echo ${multi.dev} > $out; cat ${text} >> $out" { };
  fixed = make "fixed" "printf contents > $out" {
    outputHashAlgo = "sha256";
    outputHashMode = "flat";
    outputHash = builtins.hashString "sha256" "contents";
  };
  bottom = needs "bottom" [ text ];
  left = needs "left" [ bottom fixed ];
  right = needs "right" [ bottom multi.dev ];
  top = needs "top" [ left right ];
  failing = make "failing" "echo it fails >&2; exit 3" { };
  afterFailing = needs "after-failing" [ bottom failing ];
  slow = make "slow" "echo begun; sleep 100" { };
  floatingBottom = make "floating-bottom" "mkdir $out; echo $out > $out/self" floating;
  floatingTop = make "floating-top" "echo ${floatingBottom} > $out" floating;
  afterFloating = needs "after-floating" [ floatingTop ];
}
