# Fifty derivations of every kind that a builder meets, with nothing but a static busybox as C</bin/sh>; and some that
# fail. Each output follows from its derivation alone, so whoever builds it gets the same bytes.
#
# salt: makes all of it new.
{ salt ? "" }:

let
  make = name: script: more:
    derivation ({
      inherit name salt;
      system = "x86_64-linux";
      builder = "/bin/sh";
      args = [ "-ec" script ];
    } // more);

  text = builtins.toFile "text" "some text ${salt}\n";
  source = builtins.path { path = ./source; name = "source"; };

  # A binary tree of 31: every node refers to those below it.
  node = depth: place:
    let
      below = if depth == 0 then [ ] else [ (node (depth - 1) "${place}l") (node (depth - 1) "${place}r") ];
    in
    make "node-${place}" "echo building node ${place}; echo \"$below $place\" > $out" { inherit below place; };
  root = node 4 "n";

  multi = make "multi" ''
    mkdir $out $dev $doc
    echo "$doc" > $dev/doc-of
    ln -s $dev/doc-of $out/link
    echo "$out" > $out/self
    echo "no references" > $doc/text
  '' { outputs = [ "dev" "out" "doc" ]; };

  fixed = name: algo: mode: hash: script:
    make name script { outputHashAlgo = algo; outputHashMode = mode; outputHash = hash; };

  structured = make "structured" "" {
    __structuredAttrs = true;
    outputs = [ "out" "lib" ];
    list = [ "a b" "c'd" 1 true false null ];
    object = { x = "1"; "y z" = 2; };
    nested = { deeper = [ [ 1 ] { a = "b"; } ]; };
    number = 3;
    fraction = 1.5;
    yes = true;
    no = false;
    nothing = null;
    quote = "q\"'é\n";
    "not a name" = "x";
    exportReferencesGraph.graph = [ root multi.dev ];
    outputChecks.out.allowedReferences = [ "lib" ];
    outputChecks.lib.allowedRequisites = [ "lib" ];
    outputChecks.lib.maxSize = 100000;
    args = [ "-ec" ''
      lib=$(sed 's/.*"lib":"\([^"]*\)".*/\1/' .attrs.json)
      out=$(sed 's/.*"out":"\([^"]*\)".*/\1/' .attrs.json)
      mkdir $out $lib
      # What is said of the graph must not become references.
      sed "s,/nix/store/[^\"]*,<path>,g" .attrs.json > $lib/json
      sed "s,/nix/store/[^']*,<path>,g" .attrs.sh > $lib/sh
      echo $lib > $out/lib
    '' ];
  };

  kinds = {
    inherit multi structured;
    onlyDev = make "only-dev" "cat $dev/doc-of > $out" { dev = multi.dev; };
    onlyDoc = make "only-doc" "cp -r $doc $out" { doc = multi.doc; };
    flat = fixed "flat" "sha256" "flat" (builtins.hashString "sha256" "hello") "printf hello > $out";
    flatSha1 = fixed "flat-sha1" "sha1" "flat" (builtins.hashString "sha1" "hello") "printf hello > $out";
    flatMd5 = fixed "flat-md5" "md5" "flat" (builtins.hashString "md5" "hello") "printf hello > $out";
    recursive = fixed "recursive" "sha256" "recursive" "sha256-CkMIecJm+LV/QJKg+TXPP6zUi7zN5XYNR0jKQFFx6Wk=" "printf hello > $out";
    recursiveSha512 = fixed "recursive-sha512" "sha512" "recursive"
      "sha512-ElLEiQUQPtqSIp59Mw3Bd9duoEsSJvh6Ajs9oTYJWlXgnVJxYKn2uR563hYKV+xLQE4dwUHejZj8su4bI1wTCg==" "mkdir $out; echo '#!/bin/sh' > $out/run; chmod +x $out/run; ln -s run $out/link";
    files = make "files" ''
      test -r "$bigPath" && test -z "$big"
      cat $bigPath $otherPath > $out
      echo "$small $bigPath" >> $out
    '' {
      passAsFile = [ "big" "other" "absent" ];
      big = builtins.concatStringsSep "\n" (builtins.genList toString 5000);
      other = "${text}";
      small = "small";
    };
    graph = make "graph" "cat graph > $out; grep -c node- graph; cat sources >> $out" {
      exportReferencesGraph = [ "graph" root "sources" source ];
    };
    graphOfDerivation = make "graph-of-derivation" "sed s,/nix/store/,, closure > $out" {
      exportReferencesGraph = [ "closure" multi.drvPath ];
    };
    features = make "features" "echo big > $out" { requiredSystemFeatures = [ "foo" ]; };
    copied = make "copied" "cp -r $src $out; chmod -R u+w $out; echo $src $text >> $out/sub/more" { src = source; inherit text; };
    self = make "self" "mkdir $out; echo $out > $out/self; ln -s $out $out/me" { };
    names = make "names" ''
      mkdir "$out"
      for name in a A "with blank" ... "-" 'quo"te' "ü" "日本語"; do echo "$name" > "$out/$name"; done
      mkdir -p $out/deep/er/still
      : > $out/empty
      mkdir $out/nothing-in-it
      ln -s ../../.. $out/up
      echo twice > $out/one; ln $out/one $out/two
      echo x > $out/script; chmod 4755 $out/script 2>/dev/null || chmod 755 $out/script
      chmod 600 $out/a; chmod 700 $out/deep
    '' { };
    symlink = make "symlink" "ln -s ${text} $out" { };
    executable = make "executable" "echo '#!/bin/sh' > $out; chmod +x $out" { };
    emptyFile = make "empty-file" ": > $out" { };
    checked = make "checked" "mkdir $out; echo ${text} > $out/text" {
      allowedReferences = [ text ];
      disallowedRequisites = [ multi ];
    };
    log = make "log" ''
      echo to stdout; echo to stderr >&2
      echo '@nix { "action": "setPhase", "phase": "secretPhase" }'
      printf 'overwritten\rOVER\n'
      printf 'no newline' ; : > $out
    '' { };
    view = make "view" ''
      if test -t 1; then terminal=yes; else terminal=no; fi
      {
        env | sort
        cat /etc/passwd /etc/group /etc/hosts
        hostname; id -u; id -g; umask; ulimit -c; pwd
        cat /proc/self/personality
        ls -A / | grep -v '^dev$'
        ls -A /etc
        ls -A /nix/store | sort
        ls -A /build
        cat /proc/net/dev | sed -n 's/^ *\([a-z0-9]*\):.*/\1/p'
        grep -E 'Seccomp:|NoNewPrivs:|CapEff:|SigIgn:|SigBlk:' /proc/self/status
        readlink /proc/self/fd/0
        echo $terminal
      } > view 2>&1
      # Mentioned, not referred to: what the sandbox shows is not what the output needs.
      sed 's,/nix/store/\(..\),/nix/store/\1 ,' view > $out
    '' { MIXED = "a'b\"c\n$d"; inputs = [ text multi.dev ]; };
    environment = derivation {
      name = "environment";
      system = "builtin";
      builder = "builtin:buildenv";
      inherit salt;
      manifest = text;
      derivations = [ "true" 5 1 source "true" 6 1 multi.dev ];
    };
    fetched = derivation {
      name = "fetched";
      system = "builtin";
      builder = "builtin:fetchurl";
      outputHashMode = "flat";
      outputHashAlgo = "sha256";
      outputHash = builtins.hashString "sha256" "some text ${salt}\n";
      url = "file://${text}";
    };
  };
in
{
  all = make "all" "for each in $everything; do echo $each; done > $out" {
    everything = [ root ] ++ builtins.attrValues kinds ++ [ multi.doc structured.lib ];
  };
} // kinds // {
  failing = make "failing" "echo something is wrong; touch half-done; exit 3" { };
  afterFailing = make "after-failing" "echo $input > $out" { input = make "failing" "echo something is wrong; touch half-done; exit 3" { }; };
  slow = make "slow" "echo going to sleep; sleep 1000" { };
  mismatch = fixed "mismatch" "sha256" "flat" (builtins.hashString "sha256" "something else") "printf 'hello ${salt}' > $out";
}
